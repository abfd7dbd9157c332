"""Peak memory of real training steps beside what `distillkit plan` estimates for the same run, on a GPU.

    python benchmarks/memory.py
    python benchmarks/memory.py --rows smollm2-16x2048 afm12-4x2048 --output memory_some.json
    python benchmarks/memory.py --rows tiny --gpu cpu --output memory_tiny.json    # a try, on a CPU

A row is a shape, a batch and what differs from the one-phase recipe. Teacher and hybrid student have random weights;
the steps are the product's trainer's, on random tokens, one document per row. All rows run in one process, so that
kernels are tuned once per head size. The peak is `torch.cuda.max_memory_allocated`, and the estimate what the plan
expects to be allocated, without CUDA's context. The ratio is estimate / measured.
"""

import gc
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from distillkit.config import RunConfig
from distillkit.planning import plan_run
from frame import DEVICE, GIB, Json, Options, now, option, peak_memory, run, start_peak
from steps import AFM, ALIGNMENT, KL, SHAPES, SMOLLM2, one_phase_run, run_config, take_steps


def described(
    shape: Json, batch: int, tokens: int, layers: int | None = None, arguments: Json | None = None, **changes: Any
) -> tuple[Json, Json]:
    """A row: the teacher's config.json and the YAML of a run, without paths."""
    shape = {**shape, "num_hidden_layers": layers or shape["num_hidden_layers"]}
    return shape, one_phase_run(batch, tokens, {"max_steps": 3, "logging_steps": 1, **(arguments or {})}, **changes)


CHECKPOINTED = {"gradient_checkpointing": True}
ROWS = {
    "tiny": described(SHAPES["tiny"], 2, 64),
    "smollm2-16x2048": described(SMOLLM2, 16, 2048),
    "smollm2-1x32768": described(SMOLLM2, 1, 32768),
    "smollm2-16x2048-alignment": described(SMOLLM2, 16, 2048, loss_functions=ALIGNMENT),
    "smollm2-8x2048-all-trained": described(SMOLLM2, 8, 2048, loss_functions=KL, frozen_res=[]),
    "afm12-4x2048": described(AFM, 4, 2048, 12),
    "afm12-4x2048-checkpointing": described(AFM, 4, 2048, 12, CHECKPOINTED),
    "afm12-4x2048-accumulated": described(AFM, 4, 2048, 12, {"gradient_accumulation_steps": 2}),
    "afm12-4x2048-8bit": described(AFM, 4, 2048, 12, {"optim": "adamw_torch_8bit"}),
    "afm12-4x2048-bfloat16": described(AFM, 4, 2048, 12, frozen_res=[], trained_weights="bfloat16"),
    "afm-4x2048-checkpointing": described(AFM, 4, 2048, arguments=CHECKPOINTED),
    "afm-4x2048-alignment": described(AFM, 4, 2048, loss_functions=ALIGNMENT),
    "afm-1x32768-checkpointing": described(AFM, 1, 32768, arguments=CHECKPOINTED),
}


@dataclass(kw_only=True)
class MemoryOptions(Options):
    rows: list[str] = option([name for name in ROWS if name != "tiny"], choices=[*ROWS])
    gpu: str = option("H100", "as for distillkit plan")


def measure(options: MemoryOptions) -> Iterator[Json]:
    transformers_logging.set_verbosity_error()
    for name in options.rows:
        yield measured(name, options.gpu)


def measured(name: str, gpu: str) -> Json:
    """A row with the plan's estimate and the peak in GiB, or that it did not fit."""
    shape, run_of_row = ROWS[name]
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(Path(folder), run_of_row, shape)
        started = now()
        cost = plan_run(config, gpu=gpu).phases[0].cost
        assert cost is not None
        found = {
            "row": name,
            "layers": shape["num_hidden_layers"],
            "estimated_gib": round(cost.allocated / GIB, 3),
            "estimated": {kind: round(size / GIB, 3) for kind, size in cost.memory.items()},
            "moment": cost.moment,
            "plan_seconds": round(now() - started, 1),
        }
        gc.collect()
        started = now()
        try:
            peak, speed = train(config)
        except torch.OutOfMemoryError:
            return {**found, "error": "does not fit into the device's memory"}
        finally:
            gc.collect()
            torch.cuda.empty_cache()
    numbers = {"measured_gib": round(peak / GIB, 3), "ratio": round(cost.allocated / peak, 3)}
    return {**found, **numbers, "tokens_per_second": round(speed), "seconds": round(now() - started, 1)}


def train(config: RunConfig) -> tuple[int, float]:
    """(peak bytes, tokens per second) of the steps of a run; weights are part of the peak."""
    before = start_peak()
    trainer = take_steps(config, DEVICE)
    speeds = [line["tokens_per_second"] for line in trainer.state.log_history if "tokens_per_second" in line]
    return peak_memory() - before, speeds[-1]


def summary(_: MemoryOptions, rows: list[Json]) -> Json:
    ratios = [row["ratio"] for row in rows if row.get("ratio")]
    return {"summary": {"lowest_ratio": min(ratios), "highest_ratio": max(ratios)}} if ratios else {}


if __name__ == "__main__":
    title = "peak memory of training steps beside the plan's estimate"
    run(MemoryOptions, measure, title, "flash-linear-attention", "torchao", more=summary)
