"""Do small updates survive bf16? The same distillation at learning rate 1e-5 in float32 and in four kinds of bf16.

    python benchmarks/precision.py --teacher SmolLM2-135M-Instruct.Q4_1.gguf --data train.parquet --device cuda
    python benchmarks/precision.py --teacher … --data … --steps 4 --batch 1 --tokens 64 --output small.json

Each run trains all parameters of the same freshly converted hybrid student, with the product's trainer, on the same
rows in the same order. The 8-bit optimizer needs torchao, and is slow on the CPU. `unprotected` exists in this script
only: bf16 weights under Trainer's own AdamW. Recorded are each step's loss, the mean of the last 20, and the loss of
the trained weights on held-out rows, computed in float32 for every run. On CUDA float32 means PyTorch's form of the
delta rule: fla's kernels would multiply in TF32.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from initialization import LOSSES
from measuring import RESULTS, provenance
from transformers import PreTrainedModel, Trainer, set_seed

import distillkit.student.network.kda_attention as kda_attention
from distillkit.config import DatasetSource, StudentConfig
from distillkit.conversion import build_student
from distillkit.data import build_dataset
from distillkit.losses.labels import counted_rows
from distillkit.losses.objective import ModelShape, Objective
from distillkit.models.loading import load_model, load_tokenizer
from distillkit.teacher.live import LiveTeacher
from distillkit.training.arguments import build_training_arguments
from distillkit.training.batches import Collator
from distillkit.training.distiller import Distiller
from distillkit.training.optimizers import describe
from distillkit.training.precision import cast_for_training, compute_dtype
from distillkit.training.trainer import DistillationTrainer

LAST = 20
"""Steps whose mean loss is a run's loss."""


class Unprotected(DistillationTrainer):
    """Gives bf16 weights to an optimizer that rounds to nearest."""

    get_optimizer_cls_and_kwargs = staticmethod(Trainer.get_optimizer_cls_and_kwargs)


@dataclass(frozen=True)
class Variant:
    """How a run computes, how it stores what trains, and who updates that."""

    bf16: bool = True
    trained_dtype: torch.dtype = torch.bfloat16
    optim: str = "adamw_torch"
    trainer: type[DistillationTrainer] = DistillationTrainer


VARIANTS = {
    "float32": Variant(bf16=False, trained_dtype=torch.float32),
    "bf16, float32 masters": Variant(trained_dtype=torch.float32),
    "bf16, stochastic rounding": Variant(),
    "bf16, stochastic rounding, 8-bit optimizer": Variant(optim="adamw_torch_8bit"),
    "bf16, unprotected": Variant(trainer=Unprotected),
}


def train(variant: Variant, teacher: PreTrainedModel, rows: dict[str, Dataset], args: argparse.Namespace) -> dict:
    """One row of the result: the product's trainer on a student of its own."""
    student = copy.deepcopy(build_student(teacher, StudentConfig.parse({"seed": args.seed})))
    given = {
        "bf16": variant.bf16,
        "optim": variant.optim,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "constant",
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch,
        "logging_steps": 1,
        "seed": args.seed,
        "use_cpu": args.device == "cpu",
    }
    set_seed(args.seed)
    arguments, _ = build_training_arguments(given, Path(tempfile.mkdtemp()), uses_logits=True)
    precision = cast_for_training(student, compute_dtype(arguments), variant.trained_dtype)
    shape = ModelShape(student.config.hidden_size, student.config.num_hidden_layers)
    objective = Objective(LOSSES, "all", shape, shape)
    online = LiveTeacher(teacher, objective.teacher_layers, final_norm=objective.taps_final_norm)
    collator = Collator(pad_token_id=0, sequence_length=args.tokens)
    trainer = variant.trainer(
        Distiller(student, objective),
        online,
        weights_dtype=compute_dtype(arguments),
        args=arguments,
        train_dataset=rows["train"],
        data_collator=collator,
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "precision": "unprotected bfloat16" if variant.trainer is Unprotected else precision,
        "optimizer": describe(trainer.optimizer.optimizer) if variant.trainer is not Unprotected else "AdamW",
        "last_loss": fmean(losses[-LAST:]),
        "held_out_loss": held_out_loss(trainer.model, online, [collator([row]) for row in rows["held_out"]]),
        "seconds": round(seconds, 1),
        "losses": [round(loss, 4) for loss in losses],
    }


@torch.no_grad()
def held_out_loss(distiller: Distiller, teacher: LiveTeacher, batches: list[dict[str, Any]]) -> float:
    """The objective of the weights as they are, computed in float32."""
    distiller.float().eval()
    device = next(distiller.parameters()).device
    losses = []
    with float32_kernels(True):
        for batch in batches:
            inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids", "labels")}
            normalizer = torch.tensor(len(counted_rows(inputs["labels"])), device=device)
            output = distiller(**inputs, normalizer=normalizer, signal=teacher.signal(inputs))
            losses.append(output["loss"].item())
    return fmean(losses)


@contextmanager
def float32_kernels(wanted: bool) -> Iterator[None]:
    """Within, where `wanted`, KDA computes in PyTorch's form also on CUDA."""
    available = kda_attention.FLA_AVAILABLE
    kda_attention.FLA_AVAILABLE = available and not wanted
    try:
        yield
    finally:
        kda_attention.FLA_AVAILABLE = available


def load_rows(tokenizer: Any, args: argparse.Namespace) -> dict[str, Dataset]:
    """Full rows, as many as the run has; and others."""
    source = DatasetSource(disk_path=args.data)
    rows = build_dataset(source, tokenizer, args.tokens, seed=args.seed, num_samples=args.documents)
    wanted = args.steps * args.batch
    if len(rows) < wanted + args.held_out_rows:
        raise SystemExit(f"{len(rows)} rows, but {wanted + args.held_out_rows} are needed; give more --documents")
    held_out = range(wanted, wanted + args.held_out_rows)
    return {"train": rows.select(range(wanted)), "held_out": rows.select(held_out)}


def compared(rows: list[dict[str, Any]]) -> None:
    """Add to each row by how much its losses differ from the float32 run's, in percent."""
    reference = rows[0]
    for row in rows:
        for name in ("last_loss", "held_out_loss"):
            row[f"{name}_percent_off"] = round(100 * (row[name] / reference[name] - 1), 3)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a folder or a .gguf file")
    parser.add_argument("--gguf-file", help="name of the GGUF file in the teacher's folder")
    parser.add_argument("--data", required=True, help="a file of documents")
    parser.add_argument("--documents", type=int, help="so many of them; all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="tokens per row")
    parser.add_argument("--held-out-rows", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "precision.json")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    where = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    teacher = load_model(args.teacher, dtype=torch.float32, **where).to(args.device)
    rows = load_rows(load_tokenizer(args.teacher, **where), args)
    results: list[dict[str, Any]] = []
    for name, variant in VARIANTS.items():
        if variant.optim == "adamw_torch_8bit" and find_spec("torchao") is None:
            print(f"{name}: left out, torchao is not installed", flush=True)
            continue
        with float32_kernels(not variant.bf16):
            results.append({"run": name, **train(variant, teacher, rows, args)})
        compared(results)
        print(json.dumps({key: value for key, value in results[-1].items() if key != "losses"}), flush=True)
        settings |= {"teacher": Path(args.teacher).name, "data": Path(args.data).name, "output": args.output.name}
        result = {**provenance("distillkit", "torchao"), "settings": settings, "results": results}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
