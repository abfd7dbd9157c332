"""Training steps on a GPU: tokens per second, where the time goes, and peak memory beside what the plan estimates.

    python benchmarks/throughput.py                                    # on CUDA
    python benchmarks/throughput.py --rows reference "compiled, nothing checkpointed" --output some.json
    python benchmarks/throughput.py --shape tiny --rows reference eager compiled   # a try, on a CPU

Teacher and hybrid student have random weights; tokens are random, one document per row; the recipe is the one-phase
recipe. Rows are steps of the product's own trainer, but `reference`: a training loop as one writes it first, with all
logits at once, eager, every layer checkpointed, and PyTorch's AdamW as it comes. A row is the median of some steps
after those in which kernels are tuned and compiled; two more are profiled, and the time of their kernels is sorted by
the kernels' names.

Beside it stands what `distillkit plan` says of the same step. `gflop_per_token` are its operations, recomputation
included; `share_of_matmul_rate` is that by the tokens per second over the rate of one large bf16 product in the same
process. `estimated_gib` is what it expects to be allocated, without CUDA's context; `ratio` is that over `peak_gib`.
"""

import gc
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from distillkit.config import RunConfig
from distillkit.planning import plan_run
from frame import DEVICE, GIB, Json, Options, now, option, peak_memory, run, seconds_of, start_peak
from steps import ALIGNMENT, KL, SHAPES, StepClock, one_phase_run, random_models, run_config, take_steps

BATCHES = {"afm-4.5b": (4, 2048, 32768), "smollm2-135m": (16, 2048, 32768), "tiny": (2, 64, 128)}
"""Rows and tokens of a short batch, and tokens of a long one of a single row."""

CHECKPOINTED = {"gradient_checkpointing": True}
HALF = {**CHECKPOINTED, "gradient_checkpointing_kwargs": {"every_n_layers": 2}}
COMPILED = {"torch_compile": True}
BOTH = {**CHECKPOINTED, **COMPILED}
EIGHT_BIT = {**BOTH, "optim": "adamw_torch_8bit"}
FLOAT8 = {"frozen_precision": "float8", "teacher": {"quantization": "float8"}}
KL_ALONE = {"frozen_res": [], "loss_functions": KL}
ALL = {"frozen_res": [], "trained_weights": "bfloat16"}
"""All parameters: in bf16 with stochastic rounding, for 16 bytes a parameter do not fit beside the activations."""

ROWS: dict[str, tuple[Json, Json]] = {
    "reference": ({}, {}),
    "eager": (CHECKPOINTED, {}),
    "compiled": (BOTH, {}),
    "compiled, every second layer checkpointed": ({**HALF, **COMPILED}, {}),
    "compiled, nothing checkpointed": (COMPILED, {}),
    "float8 frozen": (COMPILED, FLOAT8),
    "eager, nothing checkpointed": ({}, {}),
    "all parameters": (BOTH, ALL),
    "all parameters, 8-bit": (EIGHT_BIT, ALL),
    "alignment": ({}, {"loss_functions": ALIGNMENT}),
    "all parameters in float32, KL alone": ({}, KL_ALONE),
    "long": (BOTH, {}),
    "long, eager": (CHECKPOINTED, {}),
    "long, eager, nothing checkpointed": ({}, {}),
    "long, all parameters": (BOTH, ALL),
    "long, all parameters, 8-bit": (EIGHT_BIT, ALL),
}
"""`training_args`, and other keys of the YAML that differ from the one-phase recipe's."""
SELDOM = ("eager, nothing checkpointed", "alignment", "all parameters, 8-bit", "long, eager")
SELDOM += ("long, all parameters, 8-bit", "long, eager, nothing checkpointed", "all parameters in float32, KL alone")

CLASSES = {
    "attention": ("flash", "fmha", "pytorch_flash", "varlen"),
    "kda": ("kda", "causal_conv1d", "chunk_", "l2norm", "recompute_w_u", "wy_", "fused_beta", "gated_delta", "gate_"),
    "matmul": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk"),
    "optimizer": ("multi_tensor", "adam"),
}
"""Parts of kernels' names; the first class that has one in it gets the kernel, and `other` the rest."""


@dataclass(kw_only=True)
class ThroughputOptions(Options):
    shape: Literal["tiny", "smollm2-135m", "afm-4.5b"] = option("afm-4.5b")
    layers: int | None = option(None, "so many instead of the shape's")
    rows: list[str] = option([name for name in ROWS if name not in SELDOM], choices=[*ROWS])
    warm_up: int = option(3, "steps that are not counted, at least 1")
    steps: int = option(5)
    profiled: int = option(2)
    gpu: str = option("H100", "as for distillkit plan")


class ProfiledClock(StepClock):
    """A clock that also profiles the steps after `profiled_from`."""

    def __init__(self, profiled_from: int) -> None:
        super().__init__()
        self.profiler: Any = None
        self._profiled_from = profiled_from

    def on_step_end(self, *_: Any, **__: Any) -> None:
        super().on_step_end()
        if len(self.moments) == self._profiled_from and DEVICE.type == "cuda":
            self.profiler = profile(activities=[ProfilerActivity.CUDA])
            self.profiler.__enter__()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self.profiler is not None:
            now()
            self.profiler.__exit__(None, None, None)


def described_run(row: str, shape: str, folder: Path, layers: int | None, **more: Any) -> RunConfig:
    """The YAML of a row; `more` are further training_args."""
    arguments, changes = ROWS[row]
    rows, short, long = BATCHES[shape]
    batch, length = (1, long) if row.startswith("long") else (rows, short)
    run = one_phase_run(batch, length, {**arguments, **more}, **changes)
    return run_config(folder, run, SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers}))


def measure(options: ThroughputOptions) -> Iterator[Json]:
    transformers_logging.set_verbosity_error()
    rate = matmul_rate()
    for row in options.rows:
        print(f"{row} …", flush=True)
        found = measured(row, options)
        if "tokens_per_second" in found:
            found |= planned(found, rate, options)
        yield found


def measured(row: str, options: ThroughputOptions) -> Json:
    began = now()
    found: Json = {"row": row}
    clock = ProfiledClock(options.warm_up + options.steps)
    steps = {"max_steps": options.warm_up + options.steps + options.profiled, "logging_steps": 100}
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = described_run(row, options.shape, Path(folder), options.layers, **steps)
            batch = config.training_args["per_device_train_batch_size"]
            found |= {"batch": batch, "sequence_length": config.sequence_length}
            if row == "reference":
                reference_steps(config, clock)
            else:
                take_steps(config, DEVICE, clock=clock)
        seconds = clock.seconds(options.warm_up, options.warm_up + options.steps)
        found["tokens_per_second"] = round(batch * config.sequence_length / median(seconds))
        found |= {"step_seconds": round(median(seconds), 4), "slowest_step_seconds": round(max(seconds), 4)}
        found["peak_gib"] = round(peak_memory() / GIB, 2) if DEVICE.type == "cuda" else None
        if clock.profiler is not None:
            found |= kernel_times(clock.profiler, options.profiled, median(seconds))
    except torch.OutOfMemoryError:
        found["error"] = "does not fit into the device's memory"
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    return {**found, "seconds_in_all": round(now() - began, 1)}


def reference_steps(config: RunConfig, clock: ProfiledClock) -> None:
    """A training loop as one writes it first."""
    teacher, student = random_models(config, torch.bfloat16, DEVICE)
    for model in (teacher, student):
        model.set_attn_implementation("sdpa")
    student.gradient_checkpointing_enable({"use_reentrant": False})
    student.train()
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    size = (config.training_args["per_device_train_batch_size"], config.sequence_length)
    start_peak()
    for _ in range(config.training_args["max_steps"]):
        loss = dense_loss(teacher, student, torch.randint(student.config.vocab_size, size, device=DEVICE))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        del loss
        clock.on_step_end()
    clock.on_train_end()


def dense_loss(teacher: PreTrainedModel, student: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """The one-phase recipe on the logits of the whole batch, as transformers returns them."""
    with torch.no_grad():
        theirs = teacher(input_ids, output_hidden_states=True, use_cache=False)
    with torch.autocast(input_ids.device.type, dtype=torch.bfloat16):
        ours = student(input_ids, output_hidden_states=True, use_cache=False)

    def of_logits(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        labels = input_ids[:, 1:].flatten()
        logits, teacher_logits = (each[:, :-1].flatten(0, 1).float() for each in (logits, teacher_logits))
        log_q, log_p = ((each / 2.0).log_softmax(-1) for each in (logits, teacher_logits))
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * 4.0
        return 0.2 * F.cross_entropy(logits, labels) + 0.2 * kl

    loss = checkpoint(of_logits, ours.logits, theirs.logits, use_reentrant=False)
    layers = zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
    distances = [1 - F.cosine_similarity(one.float(), other.float(), dim=-1).mean() for one, other in layers]
    return loss + 0.6 * torch.stack(distances).mean()


def kernel_times(profiler: Any, steps: int, step_seconds: float) -> Json:
    """Seconds of a step's kernels by class, what is left of the step, and the kernels that take most."""
    by_class = dict.fromkeys((*CLASSES, "other"), 0.0)
    kernels = []
    for event in profiler.key_averages():
        seconds, name = event.self_device_time_total / 1e6 / steps, event.key.lower()
        kind = next((kind for kind, parts in CLASSES.items() if any(part in name for part in parts)), "other")
        if seconds:
            by_class[kind] += seconds
            row = {"seconds": round(seconds, 5), "calls": event.count // steps, "class": kind, "name": event.key[:90]}
            kernels.append(row)
    return {
        "kernel_seconds": {kind: round(seconds, 4) for kind, seconds in by_class.items()},
        "without_kernels_seconds": round(step_seconds - sum(by_class.values()), 4),
        "kernels_per_step": sum(row["calls"] for row in kernels),
        "slowest_kernels": sorted(kernels, key=lambda row: row["seconds"], reverse=True)[:40],
    }


def planned(found: Json, rate: float | None, options: ThroughputOptions) -> Json:
    """What the plan says of the step of a row; of the reference, only the operations, which are those of `eager`."""
    with tempfile.TemporaryDirectory() as folder:
        name = "eager" if found["row"] == "reference" else found["row"]
        config = described_run(name, options.shape, Path(folder), options.layers)
        cost = plan_run(config, gpu=options.gpu).phases[0].cost
    assert cost is not None
    gflop = sum(cost.flops.values()) / 1e9 / (found["batch"] * found["sequence_length"])
    more: Json = {"gflop_per_token": round(gflop, 2)}
    if rate is not None:
        more["share_of_matmul_rate"] = round(gflop * found["tokens_per_second"] / 1e3 / rate, 3)
    if name == found["row"]:
        more["estimated_gib"] = round(cost.allocated / GIB, 3)
        more["estimated"] = {kind: round(size / GIB, 3) for kind, size in cost.memory.items()}
        if found["peak_gib"] is not None:
            more["ratio"] = round(more["estimated_gib"] / found["peak_gib"], 3)
    return more


@cache
def matmul_rate(size: int = 8192) -> float | None:
    """TFLOP/s of a square bf16 product of random numbers on CUDA."""
    if DEVICE.type == "cpu":
        return None
    left, right = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return round(2 * size**3 / median(seconds_of(lambda: left @ right, repeats=20, warm_up=3)) / 1e12, 1)


def settings(options: ThroughputOptions, _: list[Json]) -> Json:
    return {**options.settings("shape", "layers"), "matmul_tflops": matmul_rate()}


if __name__ == "__main__":
    title = "training steps of teacher and hybrid student, by what the step is made of"
    run(ThroughputOptions, measure, title, "flash-linear-attention", "triton", "torchao", more=settings)
