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

import memory
import throughput
from distillkit.config import RunConfig
from distillkit.planning import plan_run
from frame import RESULTS, Json, Options, option, run
from steps import SMOLLM2, run_config

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
        shape, described = memory.ROWS[row["row"]]
        yield "memory.json", row["row"], run_config(folder, described, shape), row["tokens_per_second"]
    for file in files[1:3]:
        shape, layers = content[file]["shape"], content[file]["layers"]
        for row in content[file]["rows"]:
            if row["row"] != "reference":  # is no step of the product
                config = throughput.described_run(row["row"], shape, folder, layers)
                yield f"{file}.json", f"{shape}: {row['row']}", config, row["tokens_per_second"]
    for name, layout in REPLICATED.items():
        for phase in content["replication"]["variants"][name]["phases"]:
            training = phase["training_args"]
            shape, described = memory.described(
                SMOLLM2,
                training["per_device_train_batch_size"],
                phase["sequence_length"],
                arguments={"torch_compile": training["torch_compile"]},
                loss_functions=phase["loss_functions"],
                frozen_res=[],
                student={"layout": layout},
            )
            step = f"smollm2-135m: {name}, {phase['name']}"
            yield "replication.json", step, run_config(folder, described, shape), phase["tokens_per_second"]


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
    return {"planned_for": options.gpu, **memory.summary(options, rows)}


if __name__ == "__main__":
    run(PlanTimesOptions, measure, "planned tokens per second beside measured ones", more=summary)
