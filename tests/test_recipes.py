"""The recipes are configurations that are accepted as they are, and fit together."""

from pathlib import Path

import pytest

from distillkit.config import load_run_config
from distillkit.config.capture import load_capture_config
from distillkit.config.loading import read_yaml

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.mark.parametrize("name", sorted(path.name for path in RECIPES.glob("*.yaml")))
def test_a_recipe_is_accepted(name: str) -> None:
    path = RECIPES / name
    load = load_capture_config if "compression" in read_yaml(path) else load_run_config
    load(path)


def test_the_offline_recipe_learns_from_what_the_recipe_of_the_capture_writes() -> None:
    capture = load_capture_config(RECIPES / "capture_smollm2.yaml")
    run = load_run_config(RECIPES / "offline_smollm2.yaml")
    assert run.dataset.train_dataset.disk_path == capture.output_path
    assert run.sequence_length == capture.sequence_length
