"""The time that `distillkit plan` says, beside what GPUs took: the steps of the other result files, planned again.

    python benchmarks/plan_times.py      # needs no GPU; reads memory, throughput and replication of benchmarks/results

A ratio above 1 is a plan that expects more tokens per second than were measured.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import memory
import throughput
from measuring import RESULTS, provenance
from steps import SMOLLM2
from transformers.utils import logging as transformers_logging

from distillkit.config import RunConfig
from distillkit.planning import plan_run

Json = dict[str, Any]

REPLICATED = {"best-85M": "hybrid", "best_kda_only-85M": "kda_only"}
"""Variants of the replication that had an H100 each, and their layouts."""


def measured(folder: Path) -> Iterator[tuple[str, str, RunConfig, int]]:
    """Of each step that was timed: the file, its row, the run (whose teacher is in `folder`), tokens per second."""

    def read(file: str) -> Json:
        found: Json = json.loads((RESULTS / file).read_text())
        return found

    for row in read("memory.json")["rows"]:
        config = memory.described_run(memory.ON_GPU[row["row"]], folder)
        yield "memory.json", row["row"], config, row["tokens_per_second"]
    for file in ("throughput.json", "throughput_smollm2.json"):
        content = read(file)
        for row in content["rows"]:
            if row["row"] != "reference":  # is no step of the product
                config = throughput.described_run(row["row"], content["shape"], folder, content["layers"])
                yield file, f"{content['shape']}: {row['row']}", config, row["tokens_per_second"]
    variants = read("replication.json")["variants"]
    for name, layout in REPLICATED.items():
        for phase in variants[name]["phases"]:
            training = phase["training_args"]
            described = memory.row(
                SMOLLM2,
                training["per_device_train_batch_size"],
                phase["sequence_length"],
                loss_functions=phase["loss_functions"],
                frozen_res=[],
                student={"layout": layout},
                arguments={"torch_compile": training["torch_compile"]},
            )
            step = f"smollm2-135m: {name}, {phase['name']}"
            yield "replication.json", step, memory.described_run(described, folder), phase["tokens_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="H100", help="as for distillkit plan")
    parser.add_argument("--output", type=Path, default=RESULTS / "plan_times.json")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for file, name, config, speed in measured(Path(folder)):
            planned = plan_run(config, gpu=args.gpu).phases[0].tokens_per_second
            assert planned is not None
            compiled = bool(config.training_args.get("torch_compile"))
            rows.append({"file": file, "step": name, "compiled": compiled, "measured_tokens_per_second": speed})
            rows[-1] |= {"planned_tokens_per_second": round(planned), "ratio": round(planned / speed, 3)}
            print(json.dumps(rows[-1]), flush=True)
    ratios = [row["ratio"] for row in rows]
    result = {
        "benchmark": "tokens per second that the plan says, beside those that were measured",
        "command": " ".join(["python benchmarks/plan_times.py", *sys.argv[1:]]),
        **provenance(),
        "planned_for": args.gpu,
        "summary": {"lowest_ratio": min(ratios), "highest_ratio": max(ratios)},
        "rows": rows,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
