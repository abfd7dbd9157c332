"""Training steps on a GPU: tokens per second, peak memory, and where the time goes, at the shapes of real models.

    python benchmarks/throughput.py                                    # on CUDA
    python benchmarks/throughput.py --rows reference "compiled, nothing checkpointed" --output some.json
    python benchmarks/throughput.py --shape tiny --rows reference eager compiled   # a try, on a CPU
    python benchmarks/throughput.py --complete throughput.json         # adds what distillkit plan counts; needs no GPU

Teacher and hybrid student have random weights, made on the device; tokens are random, one document per row. The recipe
is the one-phase recipe: 0.2 cross-entropy, 0.2 KL at temperature 2, 0.6 cosine of all layers' outputs, bf16 autocast
over float32 masters. Rows are steps of the product's own trainer, but `reference`: a training loop as one writes it
first, with all logits at once, eager, every layer checkpointed, and PyTorch's AdamW as it comes. A row is the median of
some steps after those in which kernels are tuned and compiled; two more are profiled, and the time of their kernels is
sorted by the kernels' names. The file is written after each row.

`gflop_per_token` is what the product's plan counts for the same step, recomputation included; `share_of_matmul_rate`
is that by the tokens per second over the rate of one large bf16 product in the same process.
"""

import argparse
import gc
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from measuring import RESULTS, provenance
from steps import FROZEN, ONE_PHASE, SHAPES, StepClock, now, random_models, run_config, trainer_of
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from distillkit.config import RunConfig
from distillkit.planning import plan_run
from distillkit.training.arguments import build_training_arguments
from distillkit.training.compilation import compiled_step
from distillkit.training.precision import compute_dtype
from distillkit.training.setup import checkpoint_layers

GIB = 2**30
BATCHES = {"afm-4.5b": (4, 2048, 32768), "smollm2-135m": (16, 2048, 32768), "tiny": (2, 64, 128)}
"""Rows and tokens of a short batch, and tokens of a long one of a single row."""

CHECKPOINTED = {"gradient_checkpointing": True}
HALF = {**CHECKPOINTED, "gradient_checkpointing_kwargs": {"every_n_layers": 2}}
COMPILED = {"torch_compile": True}
ALL = {"frozen_res": [], "trained_weights": "bfloat16"}
"""All parameters: in bf16 with stochastic rounding, for 16 bytes a parameter do not fit beside the activations."""

ROWS: dict[str, dict[str, Any]] = {
    "reference": {},
    "eager": {"arguments": CHECKPOINTED},
    "compiled": {"arguments": {**CHECKPOINTED, **COMPILED}},
    "compiled, every second layer checkpointed": {"arguments": {**HALF, **COMPILED}},
    "compiled, nothing checkpointed": {"arguments": COMPILED},
    "eager, nothing checkpointed": {},
    "all parameters": {"arguments": {**CHECKPOINTED, **COMPILED}, **ALL},
    "all parameters, 8-bit": {"arguments": {**CHECKPOINTED, **COMPILED, "optim": "adamw_torch_8bit"}, **ALL},
    "long": {"long": True, "arguments": {**CHECKPOINTED, **COMPILED}},
    "long, eager": {"long": True, "arguments": CHECKPOINTED},
    "long, all parameters": {"long": True, "arguments": {**CHECKPOINTED, **COMPILED}, **ALL},
    "long, all parameters, 8-bit": {
        "long": True,
        "arguments": {**CHECKPOINTED, **COMPILED, "optim": "adamw_torch_8bit"},
        **ALL,
    },
}
USUAL = (
    "reference",
    "eager",
    "compiled",
    "compiled, every second layer checkpointed",
    "compiled, nothing checkpointed",
    "all parameters",
    "long",
    "long, all parameters",
)

CLASSES = {
    "attention": ("flash", "fmha", "pytorch_flash", "varlen"),
    "kda": ("kda", "causal_conv1d", "chunk_", "l2norm", "recompute_w_u", "wy_", "fused_beta", "gated_delta", "gate_"),
    "matmul": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk"),
    "optimizer": ("multi_tensor", "adam"),
}
"""Parts of kernels' names; the first class that has one in it gets the kernel, and `other` the rest."""


class ProfiledClock(StepClock):
    """A clock that also profiles the steps after `profiled_from`."""

    def __init__(self, profiled_from: int) -> None:
        super().__init__()
        self.profiler: Any = None
        self._profiled_from = profiled_from

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        super().on_step_end()
        if state.global_step == self._profiled_from and torch.cuda.is_available():
            self.profiler = profile(activities=[ProfilerActivity.CUDA])
            self.profiler.__enter__()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self.profiler is not None:
            now()
            self.profiler.__exit__(None, None, None)


def described_run(row: str, shape: str, folder: Path, layers: int | None) -> RunConfig:
    """The YAML of a row."""
    described = ROWS[row]
    rows, short, long = BATCHES[shape]
    arguments = {
        "bf16": True,
        "learning_rate": 1e-6,
        "per_device_train_batch_size": 1 if described.get("long") else rows,
    }
    run = {name: described[name] for name in ("frozen_res", "trained_weights") if name in described}
    described_shape = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    (folder / "config.json").write_text(json.dumps(described_shape))
    return run_config(
        folder,
        {
            "frozen_res": FROZEN,
            "loss_functions": ONE_PHASE,
            "layer_mapping": "all",
            "sequence_length": long if described.get("long") else short,
            **run,
            "training_args": {**arguments, **described.get("arguments", {})},
        },
    )


def measured(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    print(f"{row} …", flush=True)
    began = now()
    found: dict[str, Any] = {"row": row}
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = described_run(row, args.shape, Path(folder), args.layers)
            arguments = config.training_args
            batch = arguments["per_device_train_batch_size"]
            found |= {"batch": batch, "sequence_length": config.sequence_length}
            found |= (reference_steps if row == "reference" else product_steps)(config, Path(folder), args)
    except torch.OutOfMemoryError:
        found["error"] = "does not fit into the device's memory"
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {**found, "seconds_in_all": round(now() - began, 1)}


def product_steps(config: RunConfig, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The product's trainer."""
    given = {**config.training_args, "use_cpu": not torch.cuda.is_available(), "logging_steps": 100}
    given["max_steps"] = args.warm_up + args.steps + args.profiled
    arguments, techniques = build_training_arguments(given, folder / "run", uses_logits=True)
    teacher, student = random_models(config, compute_dtype(arguments), arguments.device)
    if techniques.gradient_checkpointing:
        checkpoint_layers(student, dict(techniques.gradient_checkpointing_kwargs))
    clock = ProfiledClock(args.warm_up + args.steps)
    trainer = trainer_of(config, arguments, teacher, student, callbacks=[clock])
    reset_peak()
    with compiled_step(student, teacher, trainer.model.objective, techniques.compilation):
        trainer.train()
    return report(clock, args, config)


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def reference_steps(config: RunConfig, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A training loop as one writes it first."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher, student = random_models(config, torch.bfloat16, device)
    for model in (teacher, student):
        model.set_attn_implementation("sdpa")
    student.gradient_checkpointing_enable({"use_reentrant": False})
    student.train()
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    batch = config.training_args["per_device_train_batch_size"]
    clock = ProfiledClock(args.warm_up + args.steps)
    reset_peak()
    for step in range(args.warm_up + args.steps + args.profiled):
        input_ids = torch.randint(student.config.vocab_size, (batch, config.sequence_length), device=device)
        loss = dense_loss(teacher, student, input_ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        del loss
        clock.on_step_end(None, argparse.Namespace(global_step=step + 1), None)
    clock.on_train_end()
    return report(clock, args, config)


def dense_loss(teacher: PreTrainedModel, student: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """The one-phase recipe on the logits of the whole batch, as transformers returns them."""
    with torch.no_grad():
        theirs = teacher(input_ids, output_hidden_states=True, use_cache=False)
    with torch.autocast(input_ids.device.type, dtype=torch.bfloat16):
        ours = student(input_ids, output_hidden_states=True, use_cache=False)

    def of_logits(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        labels = input_ids[:, 1:].flatten()
        logits, teacher_logits = (each[:, :-1].flatten(0, 1).float() for each in (logits, teacher_logits))
        cross_entropy = F.cross_entropy(logits, labels)
        log_q, log_p = ((each / 2.0).log_softmax(-1) for each in (logits, teacher_logits))
        return 0.2 * cross_entropy + 0.2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * 4.0

    loss = checkpoint(of_logits, ours.logits, theirs.logits, use_reentrant=False)
    distances = [
        1 - F.cosine_similarity(one.float(), other.float(), dim=-1).mean()
        for one, other in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
    ]
    return loss + 0.6 * torch.stack(distances).mean()


def report(clock: ProfiledClock, args: argparse.Namespace, config: RunConfig) -> dict[str, Any]:
    tokens = config.training_args["per_device_train_batch_size"] * config.sequence_length
    counted = clock.moments[args.warm_up - 1 : args.warm_up + args.steps]
    seconds = [later - earlier for earlier, later in zip(counted, counted[1:], strict=False)]
    step = median(seconds)
    return {
        "tokens_per_second": round(tokens / step),
        "step_seconds": round(step, 4),
        "slowest_step_seconds": round(max(seconds), 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2) if torch.cuda.is_available() else None,
        **({} if clock.profiler is None else kernel_times(clock.profiler, args.profiled, step)),
    }


def kernel_times(profiler: Any, steps: int, step_seconds: float) -> dict[str, Any]:
    """Seconds of a step's kernels by class, what is left of the step, and the kernels that take most."""
    by_class = dict.fromkeys((*CLASSES, "other"), 0.0)
    kernels = []
    for event in profiler.key_averages():
        seconds = event.self_device_time_total / 1e6 / steps
        if not seconds:
            continue
        name = event.key.lower()
        kind = next((kind for kind, parts in CLASSES.items() if any(part in name for part in parts)), "other")
        by_class[kind] += seconds
        kernels.append((seconds, event.count // steps, kind, event.key[:90]))
    kernels.sort(reverse=True)
    return {
        "kernel_seconds": {kind: round(seconds, 4) for kind, seconds in by_class.items()},
        "without_kernels_seconds": round(step_seconds - sum(by_class.values()), 4),
        "kernels_per_step": sum(count for _, count, _, _ in kernels),
        "slowest_kernels": [
            {"seconds": round(seconds, 5), "calls": count, "class": kind, "name": name}
            for seconds, count, kind, name in kernels[:40]
        ],
    }


def matmul_rate(size: int = 8192, repeats: int = 20) -> float:
    """TFLOP/s of a square bf16 product of random numbers."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    times = []
    for _ in range(repeats):
        start = now()
        left @ right
        times.append(now() - start)
    return 2 * size**3 / median(times) / 1e12


def complete(result: dict[str, Any], gpu: str) -> None:
    """Add to each row what the plan of the same step counts."""
    for row in result["rows"]:
        if "tokens_per_second" not in row:
            continue
        with tempfile.TemporaryDirectory() as folder:
            name = "eager" if row["row"] == "reference" else row["row"]
            config = described_run(name, result["shape"], Path(folder), result["layers"])
            cost = plan_run(config, gpu=gpu).phases[0].cost
        assert cost is not None
        gflop = sum(cost.flops.values()) / (row["batch"] * row["sequence_length"]) / 1e9
        row["gflop_per_token"] = round(gflop, 2)
        if result["matmul_tflops"]:
            rate = gflop * row["tokens_per_second"] / 1e3 / result["matmul_tflops"]
            row["share_of_matmul_rate"] = round(rate, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="afm-4.5b")
    parser.add_argument("--layers", type=int, help="so many instead of the shape's")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(USUAL))
    parser.add_argument("--warm-up", type=int, default=3, help="at least 1")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--profiled", type=int, default=2)
    parser.add_argument("--gpu", default="H100", help="as for distillkit plan")
    parser.add_argument("--output", type=Path, default=RESULTS / "throughput.json")
    parser.add_argument("--complete", type=Path, help="a file in which to add what the plan counts")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    if args.complete is not None:
        result = json.loads(args.complete.read_text())
        complete(result, args.gpu)
        args.complete.write_text(json.dumps(result, indent=2) + "\n")
        return
    result = {
        "benchmark": "training steps of teacher and hybrid student, by what the step is made of",
        "command": " ".join(["python benchmarks/throughput.py", *sys.argv[1:]]),
        **provenance("flash-linear-attention", "triton", "torchao"),
        "shape": args.shape,
        "layers": args.layers,
        "matmul_tflops": round(matmul_rate(), 1) if torch.cuda.is_available() else None,
        "rows": [],
    }
    for row in args.rows:
        found = measured(row, args)
        result["rows"].append(found)
        print(json.dumps({name: value for name, value in found.items() if name != "slowest_kernels"}), flush=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
