"""What `distillkit plan` expects of models that GPUs divide among themselves: 8 GPUs of one host, and 4 such hosts.

    python benchmarks/divided.py         # needs no GPU, and takes a quarter of an hour

Teacher and hybrid student have the same shapes, and all of the student's parameters train, with float32 masters and
AdamW; layers are compiled and checkpointed; two micro-batches are a step.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distillkit.planning import plan_run
from frame import GIB, Json, Options, option, run
from steps import SHAPES, one_phase_run, run_config

ALL = {"shard": 8, "replicate": 4}
CASES: list[tuple[str, int, int, int, Json | None]] = [
    ("afm-4.5b", 4, 2048, 1, None),
    ("afm-4.5b", 4, 2048, 1, {}),
    ("afm-4.5b", 4, 2048, 4, ALL),
    ("afm-4.5b", 4, 2048, 4, {}),
    ("afm-4.5b", 1, 32768, 1, {}),
    ("afm-4.5b", 1, 32768, 4, ALL),
    ("qwen3-14b", 2, 2048, 1, None),
    ("qwen3-14b", 2, 2048, 1, {}),
    ("qwen3-14b", 2, 2048, 4, ALL),
    ("qwen3-14b", 2, 2048, 4, {}),
    ("qwen3-14b", 1, 32768, 1, {}),
    ("qwen3-14b", 1, 32768, 1, {"context": 2}),
    ("qwen3-14b", 1, 32768, 4, {**ALL, "context": 2}),
    ("qwen3-14b", 1, 131072, 1, {"context": 8}),
]
"""Shape, rows of a micro-batch and their tokens, hosts of eight GPUs, and `parallel`."""

LOSSES = [{"function": name, "weight": 0.5} for name in ("cross_entropy", "kl")]
ARGUMENTS = {"torch_compile": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}


@dataclass(kw_only=True)
class DividedOptions(Options):
    gpu: str = option("H100", "as for distillkit plan")


def measure(options: DividedOptions) -> Iterator[Json]:
    for shape, rows, tokens, nodes, parallel in CASES:
        described = one_phase_run(rows, tokens, ARGUMENTS, loss_functions=LOSSES, frozen_res=[], parallel=parallel)
        with tempfile.TemporaryDirectory() as folder:
            config = run_config(Path(folder), described, SHAPES[shape])
            plan = plan_run(config, gpu=options.gpu, gpus=8, nodes=nodes)
        phase = plan.phases[0]
        assert phase.memory is not None and phase.cost is not None and phase.step is not None
        traffic, steps = phase.cost.traffic, phase.micro_batches
        sent = {"sent_inside_gib": traffic.inside, "sent_between_gib": traffic.between}
        yield {
            "models": shape,
            "rows": rows,
            "tokens": tokens,
            "gpus": plan.gpus,
            "nodes": nodes,
            "parallel": parallel,
            "memory_gib": {kind: round(size / GIB, 2) for kind, size in phase.cost.memory.items()},
            "total_gib": round(phase.memory / GIB, 1),
            "fits": plan.fits,
            **{name: round(steps * size / GIB, 2) for name, size in sent.items()},
            "computed_seconds": round(phase.step.computed, 3),
            "communicated_seconds": round(phase.step.communicated, 3),
            "alone_seconds": round(phase.step.alone, 3),
            "step_seconds": round(phase.step.total, 3),
            "limit": phase.step.limit,
            "tokens_per_second": round(phase.tokens_per_second or 0),
        }


def more(options: DividedOptions, rows: list[Json]) -> Json:
    return {"planned_for": options.gpu, "estimate": True}


if __name__ == "__main__":
    run(DividedOptions, measure, "memory, communication and speed of divided models, by the plan", more=more)
