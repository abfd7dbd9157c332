"""How a run ended: a table for the person, `results.json` for programs."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from distillkit.config import RunConfig
from distillkit.config.phases import Phase
from distillkit.console import say
from distillkit.evaluation import Divergence, Sample
from distillkit.evaluation.divergence import divergence_table
from distillkit.reporting.reading import METRICS
from distillkit.reporting.training import NOT_LOSSES
from distillkit.runs.provenance import commit, machine, versions
from distillkit.runs.writing import read_json, write_json
from distillkit.training.freezing import Freezing
from distillkit.training.progress import read_metrics
from distillkit.training.run_folder import PHASES, RESULTS, RunFolder, kept_config


def write_results(
    config: RunConfig,
    folder: RunFolder,
    freezing: Freezing,
    before: Divergence | None,
    after: Divergence | None,
    samples: list[Sample],
    device: torch.device,
) -> dict[str, Any]:
    """Write `results.json`: what was measured, and on what, with what, from what it came."""
    lines = [line for line in read_metrics(folder.path / METRICS) if "loss" in line]
    last = lines[-1] if lines else {}
    results = {
        "divergence": {
            name: asdict(measured) for name, measured in (("before", before), ("after", after)) if measured is not None
        },
        "training": {name: last.get(name) for name in ("step", "tokens", "seconds")},
        "losses": {name: value for name, value in last.items() if name not in NOT_LOSSES},
        "parameters": {"trained": freezing.trainable, "frozen": freezing.frozen},
        "samples": [asdict(sample) for sample in samples],
        "seeds": {
            "training": config.training_args.get("seed", 42),
            "data": config.dataset.seed,
            "samples": None if config.evaluation is None else config.evaluation.seed,
        },
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions(),
        "commit": commit(),
        "machine": machine(device),
        "config": kept_config(config),
    }
    write_json(folder.path / RESULTS, results)
    return results


def print_results(
    console: Console, results: dict[str, Any], before: Divergence | None, after: Divergence | None
) -> None:
    """The result as a person wants it: before and after, what it took, what the student writes now."""
    columns = {name: measured for name, measured in (("before", before), ("after", after)) if measured is not None}
    if columns:
        console.print(divergence_table(columns))
    training = results["training"]
    if training["step"]:
        rate = training["tokens"] / max(training["seconds"], 1e-9)
        say(
            console,
            f"trained {results['parameters']['trained']:,} parameters for {training['step']} steps, "
            f"{training['tokens']:,} tokens, {training['seconds']:,.0f} s ({rate:,.0f} tokens/s)",
        )
    for sample in results["samples"]:
        console.print(Text.assemble("\n", (sample["prompt"], "bold"), sample["continuation"], "\n"))


def write_results_of_phases(config: RunConfig, phases: Sequence[Phase]) -> dict[str, Any]:
    """Write the `results.json` of a whole run from those of its phases: its end is the last one's.

    It has a divergence from before only where the first phase measured as the last one did: in rows of another length,
    or on another text, the same student has another divergence.
    """
    folder = Path(config.output_path)
    found = [(phase, read_json(Path(phase.config.output_path) / RESULTS)) for phase in phases]
    first, last = found[0][1], found[-1][1]
    sums = {name: sum(results["training"][name] or 0 for _, results in found) for name in ("step", "tokens", "seconds")}
    alike = _measuring(phases[0].config) == _measuring(phases[-1].config)
    ends = {"before": first["divergence"].get("before") if alike else None, "after": last["divergence"].get("after")}
    results = {
        **last,
        "divergence": {name: measured for name, measured in ends.items() if measured is not None},
        "training": {**sums, "seconds": round(sums["seconds"], 3)},
        "phases": [_phase_row(phase, results) for phase, results in found],
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions(),
        "commit": commit(),
        "config": kept_config(config),
    }
    write_json(folder / RESULTS, results)
    return results


def _measuring(config: RunConfig) -> tuple[object, ...]:
    """All that a divergence depends on, but for the student."""
    dataset = config.dataset.model_dump(
        exclude={"train_dataset", "seed", "num_samples", "prepared_dataset_path", "dataset_num_proc"}
    )
    evaluation = config.evaluation
    return (
        config.sequence_length,
        config.teacher,
        config.dataset.train_dataset if config.teacher.kind == "dataset" else None,  # it holds the teacher's word
        dataset,
        None if evaluation is None else (evaluation.dataset, evaluation.num_tokens),
    )


def _phase_row(phase: Phase, results: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": phase.name,
        "folder": f"{PHASES}/{Path(phase.config.output_path).name}",
        "tokens": results["training"]["tokens"],
        "steps": results["training"]["step"],
        "seconds": results["training"]["seconds"],
        "sequence_length": phase.config.sequence_length,
        "losses": results["losses"],
        "loss_functions": [loss.function for loss in phase.config.loss_functions],
        "divergence": results["divergence"],
    }


def print_results_of_phases(console: Console, results: dict[str, Any]) -> None:
    """The divergence before the first phase and after each, with the length of rows where it is not one for all."""
    columns, phases = {}, results["phases"]
    several = len({phase["sequence_length"] for phase in phases}) > 1
    ends = [("before", phases[0], "before"), *((f"after {phase['name']}", phase, "after") for phase in phases)]
    for title, phase, end in ends:
        if end in phase["divergence"]:
            rows = f", rows of {phase['sequence_length']:,}" if several else ""
            columns[title + rows] = Divergence(**phase["divergence"][end])
    if columns:
        console.print(divergence_table(columns))
    training = results["training"]
    rate = training["tokens"] / max(training["seconds"], 1e-9)
    say(
        console,
        f"{len(results['phases'])} phases: {training['step']:,} steps, {training['tokens']:,} tokens, "
        f"{training['seconds']:,.0f} s ({rate:,.0f} tokens/s)",
    )
