"""How should a KDA layer start? KL to the teacher right after conversion, and after equal small training.

    python recipes/quickstart_inputs.py
    python benchmarks/initialization.py            # every variant on the inputs of the quickstart, on the CPU
    python benchmarks/initialization.py --device cuda --teacher … --train … --held-out … \\
        --steps 300 --batch 16 --tokens 2048 --evaluation-tokens 65536

A variant is a student of some `StudentConfig.initialization`, and a run of the product: the one-phase recipe, a cosine
schedule after a warm-up of an eighth of the steps. Rows of initialization.json without a variant here are ideas that
gave no reason for an option; the script of that file's commit has them.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from distillkit.training import distill
from frame import Json, Options, option, read_metrics, run
from steps import one_phase_run, run_config

INPUTS = Path("runs/quickstart/inputs")
VARIANTS: dict[str, Json] = {
    "ours": {},
    "convolution the identity": {"short_convolution": "identity"},
    "convolution as in fla": {"short_convolution": "default"},
    "output scale as in fla": {"output_scale": "default"},
    "memory spread": {"memory": "spread"},
}
"""What each differs in from the defaults of `StudentConfig.initialization`."""


@dataclass(kw_only=True)
class InitializationOptions(Options):
    teacher: str = option(str(next(INPUTS.glob("teacher/*.gguf"), INPUTS / "teacher")))
    train: str = option(str(INPUTS / "train.jsonl"))
    held_out: str = option(str(INPUTS / "valid.jsonl"))
    device: str = option("cpu")
    threads: int = option(1)
    steps: int = option(16)
    batch: int = option(2)
    tokens: int = option(256, "tokens per row")
    seed: int = option(0)
    learning_rate: float = option(1e-3)
    evaluation_tokens: int = option(2048)
    variants: list[str] = option([*VARIANTS], choices=[*VARIANTS], metavar="VARIANT")


def measure(options: InitializationOptions) -> Iterator[Json]:
    torch.set_num_threads(options.threads)
    for variant in options.variants:
        with tempfile.TemporaryDirectory() as folder:
            yield {"variant": variant, **measured(variant, options, Path(folder))}


def measured(variant: str, options: InitializationOptions, folder: Path) -> Json:
    """A whole run of the product."""
    training = {
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, options.steps // 8),
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": options.seed,
        "use_cpu": options.device == "cpu",
    }
    text = {"train_dataset": {"disk_path": options.train}, "eval_dataset": {"disk_path": options.held_out}, "seed": 0}
    described = one_phase_run(
        options.batch,
        options.tokens,
        training,
        teacher={"kind": "hf", "path": options.teacher, "kwargs": {"dtype": "bfloat16"}},
        student={"layout": "hybrid", "seed": options.seed, "initialization": VARIANTS[variant]},
        dataset=text,
        evaluation={"num_tokens": options.evaluation_tokens},
    )
    distill(run_config(folder, described), Console(quiet=True))
    results = json.loads((folder / "run" / "results.json").read_text())
    losses = [line["loss"] for line in read_metrics(folder / "run") if "loss" in line]
    divergence = results["divergence"]
    numbers = {f"{name}_{end}": divergence[end][name] for end in ("before", "after") for name in ("kl", "agreement")}
    numbers |= {"first_loss": losses[0], "last_loss": losses[-1], "training_seconds": results["training"]["seconds"]}
    return {name: round(value, 3) for name, value in numbers.items()}


def settings(options: InitializationOptions, _: list[Json]) -> Json:
    return {"settings": {**options.settings(), "dtype": "bfloat16"}}


if __name__ == "__main__":
    title = "divergence from the teacher by how a KDA layer starts"
    run(InitializationOptions, measure, title, key="results", more=settings)
