"""The time that `distillkit plan` expects, beside what GPUs took: the steps of the other result files, planned again.

    python benchmarks/plan_times.py      # needs no GPU; reads memory, throughput and replication of benchmarks/results

A ratio above 1 is a plan that expects more tokens per second than were measured.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging as transformers_logging

import throughput
from distillkit.config import RunConfig
from distillkit.planning import plan_run
from frame import RESULTS, Json, Options, option, run
from steps import SMOLLM2, one_phase_run, run_config

IN_MEMORY: dict[str, tuple[str, str, int | None]] = {
    "smollm2-16x2048": ("smollm2-135m", "eager, nothing checkpointed", None),
    "smollm2-1x32768": ("smollm2-135m", "long, eager, nothing checkpointed", None),
    "smollm2-16x2048-alignment": ("smollm2-135m", "alignment", None),
    "smollm2-8x2048-all-trained": ("smollm2-135m", "all parameters in float32, KL alone", None),
    "afm12-4x2048": ("afm-4.5b", "eager, nothing checkpointed", 12),
    "afm12-4x2048-checkpointing": ("afm-4.5b", "eager", 12),
    "afm-4x2048-checkpointing": ("afm-4.5b", "eager", None),
    "afm-4x2048-alignment": ("afm-4.5b", "alignment", None),
}
"""Rows of memory.json: shape, row of benchmarks/throughput.py, and layers."""
REPLICATED = {"best-85M": "hybrid", "best_kda_only-85M": "kda_only"}
"""Variants of the replication that had an H100 each, and their layouts."""


@dataclass(kw_only=True)
class PlanTimesOptions(Options):
    gpu: str = option("H100", "as for distillkit plan")


def timed_steps(folder: Path) -> Iterator[tuple[str, str, RunConfig, int]]:
    """Of each step that was timed: the file, its row, the run (whose teacher is in `folder`), tokens per second."""
    files = ("memory", "throughput", "throughput_smollm2", "replication")
    content = {file: json.loads((RESULTS / f"{file}.json").read_text()) for file in files}
    for row in content["memory"]["rows"]:
        shape, step, layers = IN_MEMORY[row["row"]]
        fewer = {"per_device_train_batch_size": 8} if "-8x" in row["row"] else {}
        config = throughput.described_run(step, shape, folder, layers, **fewer)
        yield "memory.json", row["row"], config, row["tokens_per_second"]
    for file in files[1:3]:
        shape, layers = content[file]["shape"], content[file]["layers"]
        for row in content[file]["rows"]:
            if row["row"] != "reference":  # is no step of the product
                config = throughput.described_run(row["row"], shape, folder, layers)
                yield f"{file}.json", f"{shape}: {row['row']}", config, row["tokens_per_second"]
    for name, layout in REPLICATED.items():
        for phase in content["replication"]["variants"][name]["phases"]:
            training = phase["training_args"]
            described = one_phase_run(
                training["per_device_train_batch_size"],
                phase["sequence_length"],
                {"torch_compile": training["torch_compile"]},
                loss_functions=phase["loss_functions"],
                frozen_res=[],
                student={"layout": layout},
            )
            step = f"smollm2-135m: {name}, {phase['name']}"
            yield "replication.json", step, run_config(folder, described, SMOLLM2), phase["tokens_per_second"]


def measure(options: PlanTimesOptions) -> Iterator[Json]:
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        for file, name, config, speed in timed_steps(Path(folder)):
            planned = plan_run(config, gpu=options.gpu).phases[0].tokens_per_second
            assert planned is not None
            row = {"file": file, "step": name, "compiled": bool(config.training_args.get("torch_compile"))}
            row |= {"measured_tokens_per_second": speed, "planned_tokens_per_second": round(planned)}
            yield {**row, "ratio": round(planned / speed, 3)}


def summary(options: PlanTimesOptions, rows: list[Json]) -> Json:
    ratios = [row["ratio"] for row in rows]
    return {"planned_for": options.gpu, "summary": {"lowest_ratio": min(ratios), "highest_ratio": max(ratios)}}


if __name__ == "__main__":
    run(PlanTimesOptions, measure, "planned tokens per second beside measured ones", more=summary)
