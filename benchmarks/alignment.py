"""Attention alignment (`attn_mse`) against end-to-end distillation: its time per token, and what it is worth.

    python benchmarks/alignment.py time --shapes smollm2 afm
    python benchmarks/alignment.py quality --teacher FOLDER [--gguf-file NAME] --data train.parquet --eval valid.parquet
    python benchmarks/alignment.py all --shapes smollm2 --teacher … --data … --eval …     # both in one process
    python benchmarks/alignment.py all … --layers 2 --batch 1 --sequence-length 64 --steps 2 --tokens 2000   # a try

`time`: a step of the product's trainer (teacher, student, optimizer; bf16 autocast over float32 masters) on random
weights of a named shape and random tokens, one document per row. End to end is the one-phase recipe: frozen MLPs,
embeddings, head and norms, 0.2 cross-entropy, 0.2 KL at temperature 2, 0.6 cosine over all layers' outputs. Alignment
trains the same parameters, those of attention. The median over the steps after the first few, and the peak of memory.

`quality`: a freshly converted hybrid learns for `--tokens` tokens by the one-phase recipe; another one first has its
attention aligned for `--alignment-share` of the seconds that takes, and the one-phase recipe for what is left of them.
How many tokens that is follows from the speed of both in a short run before. All phases have the same schedule:
cosine after a warm-up. Recorded is what the held-out text says at the end, and how the losses went.

Results are kept in one file, part by part, as soon as each is there.
"""

import argparse
import gc
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import MIB, RESULTS, peak_memory, provenance
from rich.console import Console
from steps import AFM, ALIGNMENT, FROZEN, ONE_PHASE, SMOLLM2, StepClock, run_config, trainer_of
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from distillkit.config import DatasetSource, RunConfig, StudentConfig
from distillkit.conversion import student_on_meta
from distillkit.conversion.convert import convert
from distillkit.data import build_dataset
from distillkit.models.loading import load_tokenizer
from distillkit.models.varlen_attention import use_varlen_attention
from distillkit.training import distill
from distillkit.training.arguments import build_training_arguments
from distillkit.training.freezing import freeze
from distillkit.training.precision import cast_for_training
from distillkit.training.setup import checkpoint_layers

SHAPES = {"smollm2": SMOLLM2, "afm": AFM}
# Alignment first: on a CPU only the highest peak of the process is known, and the other's is higher.
METHODS = {"alignment": ALIGNMENT, "end to end": ONE_PHASE}
WARM_UP = 3
"""Steps that are made and not counted: kernels are tuned in them."""


def measure_time(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """A row for each method, and how their times compare."""
    teacher, student = random_models(shape, args)
    settings = {"shape": shape, "layers": len(teacher.get_decoder().layers)}
    settings |= {name: getattr(args, name) for name in ("batch", "sequence_length", "gradient_checkpointing")}
    rows = []
    for method, losses in METHODS.items():
        rows.append({"method": method, **steps_of(losses, teacher, student, args)})
        print(json.dumps({**settings, **rows[-1]}), flush=True)
        gc.collect()
    times = [row.get("microseconds_per_token") for row in rows]
    ratio = None if None in times else round(times[0] / times[1], 3)
    return {**settings, "device": args.device.type, "alignment_over_end_to_end": ratio, "methods": rows}


def random_models(shape: str, args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Teacher and hybrid student, made on the device; the student's attention in float32, all else in bf16."""
    described = SHAPES[shape]
    layers = args.layers or described["num_hidden_layers"]
    config = AutoConfig.for_model(**{**described, "num_hidden_layers": layers})
    config.dtype = torch.bfloat16
    torch.manual_seed(args.seed)
    with torch.device(args.device):
        teacher, student = (
            AutoModelForCausalLM.from_config(each, dtype=torch.bfloat16)
            for each in (config, student_on_meta(config, StudentConfig()).config)
        )
    freeze(student, FROZEN)
    cast_for_training(student, torch.bfloat16)
    for model in (teacher, student):
        use_varlen_attention(model, torch.bfloat16)
    if args.gradient_checkpointing:
        checkpoint_layers(student, {"use_reentrant": False})
    return teacher, student


def steps_of(
    losses: list[dict[str, Any]], teacher: PreTrainedModel, student: PreTrainedModel, args: argparse.Namespace
) -> dict[str, Any]:
    """Train for some steps; seconds, time per token and the peak of memory, or that it did not fit."""
    given = {
        "bf16": True,
        "use_cpu": args.device.type == "cpu",
        "learning_rate": 1e-6,
        "max_steps": WARM_UP + args.steps,
        "per_device_train_batch_size": args.batch,
    }
    folder = Path(tempfile.mkdtemp())
    config = run_config(
        folder, {"sequence_length": args.sequence_length, "loss_functions": losses, "layer_mapping": "all"}
    )
    arguments, _ = build_training_arguments(given, folder, uses_logits=True)
    clock = StepClock()
    trainer = trainer_of(config, arguments, teacher, student, seed=args.seed, callbacks=[clock])
    if args.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        trainer.train()
    except torch.OutOfMemoryError:
        return {"error": "does not fit into the device's memory"}
    finally:
        student.zero_grad(set_to_none=True)
    moments = clock.moments[WARM_UP - 1 :]
    seconds = median(end - start for start, end in zip(moments, moments[1:], strict=False))
    tokens = args.batch * args.sequence_length
    peak = torch.cuda.max_memory_allocated() if args.device.type == "cuda" else peak_memory()
    return {
        "seconds_per_step": round(seconds, 4),
        "microseconds_per_token": round(1e6 * seconds / tokens, 3),
        "tokens_per_second": round(tokens / seconds),
        "peak_gib": round(peak / MIB / 1024, 2),
        "loss": trainer.state.log_history[0]["loss"],
    }


def measure_quality(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is known so far, after each of the runs."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(args.work or folder)
        described = configuration(work, args)
        speeds = {
            method: probe(described, losses, work / f"probe {method}", args) for method, losses in METHODS.items()
        }
        found: dict[str, Any] = {"tokens_per_second_before": speeds}
        yield found
        found["one phase"] = run({**described, "tokens": args.tokens, "loss_functions": ONE_PHASE}, work / "one_phase")
        yield found
        seconds = found["one phase"]["seconds"]
        aligned = args.alignment_share * seconds * speeds["alignment"]
        phases = [
            {
                "name": "alignment",
                "tokens": round(aligned),
                "loss_functions": ALIGNMENT,
                "training_args": {"learning_rate": args.alignment_learning_rate},
            },
            {
                "name": "one_phase",
                "tokens": round((1 - args.alignment_share) * found["one phase"]["tokens"]),
                "loss_functions": ONE_PHASE,
            },
        ]
        found["alignment first"] = run({**described, "phases": phases}, work / "alignment_first")
        found["kl_alignment_first_over_one_phase"] = round(found["alignment first"]["kl"] / found["one phase"]["kl"], 4)
        found["seconds_alignment_first_over_one_phase"] = round(found["alignment first"]["seconds"] / seconds, 4)
        yield found


def configuration(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What all runs have in common: rows that are tokenised and packed once, a student that is converted once."""
    where = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    tokenizer = load_tokenizer(args.teacher, **where)
    for name, path, number in (("train", args.data, args.documents), ("eval", args.eval, args.eval_documents)):
        rows = build_dataset(
            DatasetSource(disk_path=path),
            tokenizer,
            args.sequence_length,
            seed=args.seed,
            num_samples=number,
            num_proc=args.processes,
        )
        rows.save_to_disk(work / name)
        print(f"{name}: {len(rows)} rows", flush=True)
    convert(args.teacher, work / "student", StudentConfig(), dtype=torch.bfloat16, **where)
    return {
        "teacher": {"kind": "hf", "path": args.teacher, "kwargs": {"dtype": "bfloat16", **where}},
        "model": str(work / "student"),
        "sequence_length": args.sequence_length,
        "frozen_res": FROZEN,
        "layer_mapping": "all",
        "dataset": {
            "train_dataset": {"disk_path": str(work / "train")},
            "eval_dataset": {"disk_path": str(work / "eval")},
            "prepacked": True,
            "seed": args.seed,
        },
        "training_args": {
            "bf16": True,
            "use_cpu": args.device.type == "cpu",
            "per_device_train_batch_size": args.batch,
            "gradient_checkpointing": args.gradient_checkpointing,
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.025,
            "max_grad_norm": 0.5,
            "logging_steps": args.logging_steps,
            "save_strategy": "no",
            "seed": args.seed,
        },
        "evaluation": {"num_tokens": args.evaluation_tokens},
    }


def probe(described: dict[str, Any], losses: list[dict[str, Any]], folder: Path, args: argparse.Namespace) -> float:
    """Tokens per second, the first steps left out."""
    training = {**described["training_args"], "max_steps": WARM_UP + args.steps, "logging_steps": 1}
    changes = {"loss_functions": losses, "training_args": training, "evaluation": None}
    run({**described, **changes}, folder)
    speeds = [line["tokens_per_second"] for line in metrics(folder) if "loss" in line][WARM_UP:]
    return round(median(speeds), 1)


def run(described: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run of the product, from the conversion to the divergence."""
    config = RunConfig.parse({**described, "output_path": str(folder)})
    distill(config, Console(file=io.StringIO()))
    results = json.loads((folder / "results.json").read_text())
    after = results["divergence"].get("after", {})
    row = {**results["training"], "kl": after.get("kl"), "divergence": results["divergence"]}
    phases = results.get("phases", [])
    if phases:
        kept = ("name", "tokens", "steps", "seconds", "losses", "divergence")
        row["phases"] = [
            {**{name: phase[name] for name in kept}, "curve": curve(folder / phase["folder"])} for phase in phases
        ]
    else:
        row["curve"] = curve(folder)
    print(json.dumps({"run": folder.name, **{name: row[name] for name in ("tokens", "seconds", "kl")}}), flush=True)
    return row


def curve(folder: Path) -> list[dict[str, Any]]:
    left_out = ("epoch", "grad_norm", "tokens_per_second")
    lines = [line for line in metrics(folder) if "loss" in line]
    return [
        {
            name: round(value, 5 if name != "learning_rate" else 8)
            for name, value in line.items()
            if name not in left_out
        }
        for line in lines
    ]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def keep(part: str, value: Any, args: argparse.Namespace) -> None:
    """Write one part of the results, with where it came from; other parts stay as they are."""
    former = json.loads(args.output.read_text()) if args.output.exists() else {}
    settings = {
        name: str(each) if isinstance(each, (Path, torch.device)) else each for name, each in vars(args).items()
    }
    settings |= {name: Path(settings[name]).name for name in ("teacher", "data", "eval", "output") if settings[name]}
    made = {**provenance("distillkit", "flash-linear-attention"), "settings": settings}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({**former, part: {**made, "results": value}}, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("time", "quality", "all"))
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument(
        "--steps", type=int, default=10, help="measured steps, of `time` and of the run before `quality`"
    )
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, default=RESULTS / "alignment.json")
    of_time = parser.add_argument_group("time")
    of_time.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["smollm2"])
    of_time.add_argument("--layers", type=int, help="so many instead of the shape's")
    of_quality = parser.add_argument_group("quality")
    of_quality.add_argument("--teacher", help="a folder")
    of_quality.add_argument("--gguf-file", help="name of the GGUF file in the teacher's folder")
    of_quality.add_argument("--data", help="a file of documents")
    of_quality.add_argument("--eval", help="a file of held-out documents")
    of_quality.add_argument("--documents", type=int, help="so many of --data; all by default")
    of_quality.add_argument("--eval-documents", type=int)
    of_quality.add_argument("--processes", type=int, help="that tokenise")
    of_quality.add_argument("--tokens", type=int, default=8_000_000, help="of the one-phase run")
    of_quality.add_argument("--alignment-share", type=float, default=0.25, help="of the one-phase run's seconds")
    of_quality.add_argument("--learning-rate", type=float, default=1e-3)
    of_quality.add_argument("--alignment-learning-rate", type=float, default=1e-3)
    of_quality.add_argument("--evaluation-tokens", type=int, default=98304)
    of_quality.add_argument("--logging-steps", type=int, default=10)
    of_quality.add_argument("--work", type=Path, help="folder that keeps the runs")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.part != "time" and not (args.teacher and args.data and args.eval):
        raise SystemExit("quality needs --teacher, --data and --eval")
    if args.part != "quality":
        rows = []
        for shape in args.shapes:
            rows.append(measure_time(shape, args))
            keep("time", rows, args)
    if args.part != "time":
        for found in measure_quality(args):
            keep("quality", found, args)


if __name__ == "__main__":
    main()
