"""Each recipe is accepted as it is, and runs from beginning to end on tiny models of its teacher's family.

Only paths, sizes and budgets are overridden: layouts, losses, freezing, precision and phases are the recipe's own.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import ArceeConfig, ArceeForCausalLM, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from distillkit.capture.capture import capture
from distillkit.config import load_run_config, phases_of
from distillkit.config.capture import load_capture_config
from distillkit.config.loading import read_yaml
from distillkit.conversion.convert import convert
from distillkit.training import distill
from tests.training.tiny import BYTES, save_text, tokenizer

RECIPES = Path(__file__).parent.parent / "recipes"
ALL = sorted(str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.yaml"))
CAPTURES = [name for name in ALL if "compression" in read_yaml(RECIPES / name)]
OFFLINE = "smollm2/offline.yaml"
ONLINE = [name for name in ALL if name not in (*CAPTURES, OFFLINE)]

LAYERS = 20
FULL_ATTENTION = {"hybrid": [3, 7, 11, 15, 19], "front_loaded": [0, 1, 2, 3, 19], "kda_only": []}
STEPS = 2
ROWS = 2
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A teacher of each family as deep as layouts need, and text."""
    folder = tmp_path_factory.mktemp("inputs")
    shape = {
        "vocab_size": BYTES,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    families = {
        "smollm2": LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)),
        "afm-4.5b": ArceeForCausalLM(ArceeConfig(**shape, tie_word_embeddings=False)),
    }
    for family, model in families.items():
        model.save_pretrained(folder / family)
        tokenizer().save_pretrained(folder / family)
    return {
        **{family: str(folder / family) for family in families},
        "train": save_text(folder / "train.jsonl", documents=60),
        "valid": save_text(folder / "valid.jsonl", documents=30),
    }


def family_of(name: str) -> str:
    return "afm-4.5b" if name.startswith("afm-4.5b") else "smollm2"


def small(name: str, inputs: dict[str, str], folder: Path) -> list[str]:
    """Overrides that make a recipe's run tiny."""
    recipe = read_yaml(RECIPES / name)
    overrides = [
        f"output_path={folder}",
        f"teacher.path={inputs[family_of(name)]}",
        f"dataset.train_dataset={{disk_path: {inputs['train']}}}",
        f"dataset.eval_dataset={{disk_path: {inputs['valid']}}}",
        "evaluation.num_tokens=128",
        "evaluation.max_new_tokens=2",
    ]
    if "gguf_file" in recipe["teacher"].get("kwargs", {}):
        overrides.append("teacher.kwargs={dtype: bfloat16}")
    return (
        overrides
        + small_training(recipe, "", 64)
        + [
            override
            for index, phase in enumerate(recipe.get("phases", []))
            for override in small_training(phase, f"phases.{index}.", 128 if "sequence_length" in phase else 64)
        ]
    )


def small_training(section: dict[str, Any], prefix: str, sequence_length: int) -> list[str]:
    """Two steps of two rows, by the kind of budget that the recipe has itself."""
    arguments = section.get("training_args", {})
    overrides = [f"{prefix}training_args.per_device_train_batch_size={ROWS}"]
    if "sequence_length" in section:
        overrides.append(f"{prefix}sequence_length={sequence_length}")
    if "gradient_accumulation_steps" in arguments:
        overrides.append(f"{prefix}training_args.gradient_accumulation_steps=1")
    if "tokens" in section:
        overrides.append(f"{prefix}tokens={int((STEPS - 0.5) * ROWS * sequence_length)}")
    elif "max_steps" in arguments or "num_train_epochs" in arguments:
        overrides.append(f"{prefix}training_args.max_steps={STEPS}")
    return overrides


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    """As they lie in the folder, in float32."""
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_is_accepted(name: str) -> None:
    load = load_capture_config if name in CAPTURES else load_run_config
    load(RECIPES / name)


@pytest.mark.parametrize("name", [name for name in ALL if "extends" in (RECIPES / name).read_text()])
def test_a_variant_writes_elsewhere_than_what_it_extends(name: str) -> None:
    paths = [load_run_config(RECIPES / each).output_path for each in ALL if each not in CAPTURES]
    assert paths.count(load_run_config(RECIPES / name).output_path) == 1
