"""What attention alignment (`attn_mse`) is worth beside end-to-end distillation in the same time.

    python benchmarks/alignment.py --teacher FOLDER [--gguf-file NAME] --data train.parquet --eval valid.parquet
    python benchmarks/alignment.py --teacher … --batch 1 --sequence-length 64 --steps 2 --tokens 2000   # a try

A freshly converted hybrid learns for `--tokens` tokens by the one-phase recipe; another one first has its attention
aligned for `--alignment-share` of the seconds that takes, and the one-phase recipe for the rest of them. How many
tokens that is follows from the speed of both in a short run before. All phases have the same schedule: cosine after a
warm-up. Recorded are the divergence on held-out text at the end, and the losses; the file is written after each run.

What a step of each costs: rows `alignment` and `eager, nothing checkpointed` of benchmarks/throughput.py.
"""

import io
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console

from distillkit.config import RunConfig
from distillkit.training import distill
from frame import Json, TeacherOptions, option, parse, provenance, read_metrics, show, write_whole
from steps import ALIGNMENT, FROZEN, ONE_PHASE

METHODS = {"alignment": ALIGNMENT, "end to end": ONE_PHASE}
WARM_UP = 3
"""Steps that are made and not counted: kernels are tuned in them."""


@dataclass(kw_only=True)
class AlignmentOptions(TeacherOptions):
    data: str = option(help="a file of documents")
    eval: str = option(help="a file of held-out documents")
    documents: int | None = option(None, "so many of --data")
    eval_documents: int | None = option(None)
    processes: int | None = option(None, "that tokenise")
    batch: int = option(16)
    sequence_length: int = option(2048)
    gradient_checkpointing: bool = option(False)
    steps: int = option(10, "measured steps of the short run before")
    tokens: int = option(8_000_000, "of the one-phase run")
    alignment_share: float = option(0.25, "of the one-phase run's seconds")
    learning_rate: float = option(1e-3)
    alignment_learning_rate: float = option(1e-3)
    evaluation_tokens: int = option(98304)
    logging_steps: int = option(10)
    seed: int = option(42)
    work: Path | None = option(None, "folder that keeps the runs")


def measure(options: AlignmentOptions, work: Path) -> Iterator[Json]:
    """What is known so far, after each of the runs."""
    described = common_configuration(work, options)
    speeds = {method: probe(described, losses, work, options) for method, losses in METHODS.items()}
    found: Json = {"tokens_per_second_before": speeds}
    yield found
    one_phase = distilled({**described, "tokens": options.tokens, "loss_functions": ONE_PHASE}, work / "one_phase")
    found["one phase"] = one_phase
    yield found
    share = options.alignment_share
    aligned = {"name": "alignment", "tokens": round(share * one_phase["seconds"] * speeds["alignment"])}
    aligned |= {"loss_functions": ALIGNMENT, "training_args": {"learning_rate": options.alignment_learning_rate}}
    rest = {"name": "one_phase", "tokens": round((1 - share) * one_phase["tokens"]), "loss_functions": ONE_PHASE}
    first = distilled({**described, "phases": [aligned, rest]}, work / "alignment_first")
    found["alignment first"] = first
    for name in ("kl", "seconds"):
        found[f"{name}_alignment_first_over_one_phase"] = round(first[name] / one_phase[name], 4)
    yield found


def common_configuration(work: Path, options: AlignmentOptions) -> Json:
    """What all runs have in common; rows are tokenised and packed once."""
    return {
        "teacher": {"kind": "hf", "path": options.teacher, "kwargs": {"dtype": "bfloat16", **options.where}},
        "student": {"layout": "hybrid"},
        "sequence_length": options.sequence_length,
        "frozen_res": FROZEN,
        "layer_mapping": "all",
        "dataset": {
            "train_dataset": {"disk_path": options.data},
            "eval_dataset": {"disk_path": options.eval},
            "num_samples": options.documents,
            "num_eval_samples": options.eval_documents,
            "dataset_num_proc": options.processes,
            "prepared_dataset_path": str(work / "rows"),
            "seed": options.seed,
        },
        "training_args": {
            "per_device_train_batch_size": options.batch,
            "gradient_checkpointing": options.gradient_checkpointing,
            "bf16": True,
            "learning_rate": options.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.025,
            "max_grad_norm": 0.5,
            "logging_steps": options.logging_steps,
            "save_strategy": "no",
            "seed": options.seed,
        },
        "evaluation": {"num_tokens": options.evaluation_tokens},
    }


def probe(described: Json, losses: list[Json], work: Path, options: AlignmentOptions) -> float:
    """Tokens per second, without the first steps."""
    training = {**described["training_args"], "max_steps": WARM_UP + options.steps, "logging_steps": 1}
    folder = work / f"probe {losses[-1]['function']}"
    distilled({**described, "loss_functions": losses, "training_args": training, "evaluation": None}, folder)
    return round(median(line["tokens_per_second"] for line in logged_steps(folder)[WARM_UP:]), 1)


def distilled(described: Json, folder: Path) -> Json:
    """One run of the product, from the conversion to the divergence."""
    distill(RunConfig.parse({**described, "output_path": str(folder)}), Console(file=io.StringIO()))
    results = json.loads((folder / "results.json").read_text())
    divergence = results["divergence"]
    row: Json = {**results["training"], "kl": divergence.get("after", {}).get("kl"), "divergence": divergence}
    if phases := results.get("phases"):
        kept = ("name", "tokens", "steps", "seconds", "losses", "divergence")
        curves = [curve(folder / phase["folder"]) for phase in phases]
        row["phases"] = [
            {**{name: phase[name] for name in kept}, "curve": each} for phase, each in zip(phases, curves, strict=True)
        ]
    else:
        row["curve"] = curve(folder)
    show({"run": folder.name, **{name: row[name] for name in ("tokens", "seconds", "kl")}})
    return row


def curve(folder: Path) -> list[Json]:
    left_out = ("epoch", "grad_norm", "tokens_per_second")
    lines = [{name: value for name, value in line.items() if name not in left_out} for line in logged_steps(folder)]
    return [{name: round(line[name], 8 if name == "learning_rate" else 5) for name in line} for line in lines]


def logged_steps(folder: Path) -> list[Json]:
    return [line for line in read_metrics(folder) if "loss" in line]


if __name__ == "__main__":
    options = parse(AlignmentOptions, sys.argv[2:] if sys.argv[1:2] == ["all"] else None)
    path = options.result_file
    former = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for results in measure(options, options.work or Path(folder)):
            made = {**provenance("flash-linear-attention"), "settings": options.settings()}
            write_whole(path, {**former, "quality": {**made, "results": results}})
