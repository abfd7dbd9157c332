"""A YAML file may extend another: mappings are merged, all else is replaced."""

from pathlib import Path

import pytest

from distillkit.config import UserError, load_run
from distillkit.config.capture import load_capture_config
from distillkit.config.yaml_files import read_yaml

BASE = """
model: org/student
output_path: out
sequence_length: 512
teacher: {kind: hf, path: org/teacher, kwargs: {dtype: bfloat16}}
dataset:
  train_dataset: {repo_id: org/text, split: train}
  seed: 1
frozen_res: [mlp, norm]
training_args: {num_train_epochs: 1, warmup_ratio: 0.1, learning_rate: 1e-3, packing: false}
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base.yaml", BASE)


def test_mappings_are_merged_and_all_else_is_replaced(base: Path) -> None:
    child = write(
        base.with_name("child.yaml"),
        "extends: base.yaml\nfrozen_res: [lm_head]\nteacher: {kwargs: {revision: v1}}\n"
        "training_args: {weight_decay: 1}\n",
    )
    config = load_run(child).config
    assert config.teacher.kind == "hf" and config.teacher.kwargs == {"dtype": "bfloat16", "revision": "v1"}
    assert config.frozen_res == ["lm_head"]
    assert (config.training_args["learning_rate"], config.training_args["weight_decay"]) == (1e-3, 1)
    assert (config.model, config.dataset.seed) == ("org/student", 1)


def test_what_a_file_names_goes_before_what_it_extends_under_any_name(base: Path) -> None:
    child = write(
        base.with_name("child.yaml"),
        "extends: base.yaml\ntokens: 5k\nteacher: {kind: dataset}\ntraining_args: {warmup_steps: 7, packing: true}\n"
        "dataset: {train_dataset: {disk_path: captured}}\n",
    )
    config = load_run(child).config
    assert config.tokens == 5000 and "num_train_epochs" not in config.training_args
    assert config.training_args["warmup_steps"] == 7
    assert config.teacher.kind == "dataset"
    assert config.dataset.packing
    assert (config.dataset.train_dataset.repo_id, config.dataset.train_dataset.split) == (None, None)
    assert config.dataset.seed == 1


def test_a_null_takes_a_key_away(base: Path) -> None:
    child = write(base.with_name("child.yaml"), "extends: base.yaml\nmodel: null\nstudent: {layout: kda_only}\n")
    config = load_run(child).config
    assert config.model is None and config.student is not None


def test_paths_are_relative_to_the_file_that_names_them(tmp_path: Path, base: Path) -> None:
    middle = write(tmp_path / "models" / "middle.yaml", "extends: ../base.yaml\nsequence_length: 1024\n")
    top = write(tmp_path / "tries" / "a" / "top.yaml", "extends: ../../models/middle.yaml\noutput_path: top\n")
    config = load_run(top).config
    assert (config.sequence_length, config.output_path, config.model) == (1024, "top", "org/student")
    absolute = write(tmp_path / "absolute.yaml", f"extends: {middle}\n")
    assert load_run(absolute).config.sequence_length == 1024


def test_overrides_go_before_all_files(base: Path) -> None:
    child = write(base.with_name("child.yaml"), "extends: base.yaml\nsequence_length: 1024\n")
    config = load_run(child, ["sequence_length=2048", "dataset.seed=9", "training_args.max_steps=3"]).config
    assert (config.sequence_length, config.dataset.seed, config.training_args["max_steps"]) == (2048, 9, 3)


def test_what_extends_is_no_key_of_the_run(base: Path) -> None:
    assert "extends" not in read_yaml(write(base.with_name("child.yaml"), "extends: base.yaml\n"))


def test_captures_extend_too(tmp_path: Path) -> None:
    recipe = Path("recipes/capture_quickstart.yaml").resolve()
    child = write(tmp_path / "held_out.yaml", f"extends: {recipe}\noutput_path: held_out\n")
    captured = load_capture_config(child)
    assert (captured.output_path, captured.sequence_length) == ("held_out", 256)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("extends: none.yaml\n", "run.yaml: extends: no such file: '{folder}/none.yaml'"),
        ("extends: [base.yaml]\n", "run.yaml: extends: must be the path of a YAML file, got ['base.yaml']"),
        ("extends:\n", "run.yaml: extends: must be the path of a YAML file, got nothing"),
        (
            "extends: run.yaml\n",
            "run.yaml: extends: is circular (run.yaml extends run.yaml); one of them must not extend another",
        ),
        (
            "extends: circle.yaml\n",
            "circle.yaml: extends: is circular (run.yaml extends circle.yaml extends run.yaml); one of",
        ),
        ("extends: broken.yaml\n", "broken.yaml: line 1: "),
        ("extends: base.yaml\nsequence_length: 0\n", "sequence_length: must be > 0, got 0"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_file(base: Path, text: str, line: str) -> None:
    write(base.with_name("circle.yaml"), "extends: run.yaml\n")
    write(base.with_name("broken.yaml"), "a: ]\n")
    path = write(base.with_name("run.yaml"), text)
    with pytest.raises(UserError) as caught:
        load_run(path)
    line = line.format(folder=base.parent)
    assert str(caught.value).startswith((line, f"{base.parent}/{line}"))
    assert "\n" not in str(caught.value)
