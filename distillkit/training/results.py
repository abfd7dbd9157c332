"""How a run ended: a table for the person, `results.json` for programs."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from distillkit.config import Phase, Run, RunConfig
from distillkit.console import print_line
from distillkit.evaluation import Divergence, Sample
from distillkit.evaluation.divergence import divergence_table
from distillkit.runs.clock import Clock, clock_record
from distillkit.runs.metrics import NOT_LOSSES, read_metrics
from distillkit.runs.names import PHASES, RESULTS
from distillkit.runs.provenance import commit, machine, versions
from distillkit.runs.record import kept_config
from distillkit.runs.writing import read_sealed, write_sealed
from distillkit.training.freezing import Freezing

Json = dict[str, Any]


def write_phase_results(
    phase: Phase,
    folder: Path,
    freezing: Freezing,
    before: Divergence | None,
    after: Divergence | None,
    samples: list[Sample],
    seconds: dict[str, float],
    device: torch.device,
) -> Json:
    """Write `results.json` of a phase: what was measured, on what, with what, and from what.

    seconds: per part, since the command started or the phase before had its results.
    """
    config = phase.config
    last = next((line for line in reversed(read_metrics(folder)) if "loss" in line), {})
    ends = {"before": before, "after": after}
    results = {
        "divergence": {name: asdict(measured) for name, measured in ends.items() if measured is not None},
        "training": {name: last.get(name) for name in ("step", "tokens", "seconds")},
        "clock": clock_record(seconds),
        "losses": {name: value for name, value in last.items() if name not in NOT_LOSSES},
        "parameters": {"trained": freezing.trainable, "frozen": freezing.frozen},
        "samples": [asdict(sample) for sample in samples],
        "seeds": _seeds(config),
        **_made_with(config),
        "machine": machine(device),
    }
    write_sealed(folder / RESULTS, results)
    return results


def write_run_results(run: Run, clock: Clock) -> Json:
    """Write the `results.json` of a run from those of its phases: its end is the last one's.

    It has a divergence from before only where the first phase measured as the last one did: in rows of another length,
    or on another text, the same student has another divergence.
    """
    found = [(phase, read_sealed(phase.folder / RESULTS)) for phase in run.phases]
    first, last = found[0][1], found[-1][1]
    sums = {name: sum(results["training"][name] or 0 for _, results in found) for name in ("step", "tokens", "seconds")}
    alike = _measured_on(run.phases[0].config) == _measured_on(run.phases[-1].config)
    ends = {"before": first["divergence"].get("before") if alike else None, "after": last["divergence"].get("after")}
    results = {
        **last,
        "divergence": {name: measured for name, measured in ends.items() if measured is not None},
        "training": {**sums, "seconds": round(sums["seconds"], 3)},
        "clock": clock_record(clock.seconds()),
        "phases": [_phase_row(phase, results) for phase, results in found],
        "seeds": _seeds(run.config),
        **_made_with(run.config),
    }
    write_sealed(run.folder / RESULTS, results)
    return results


def print_results(console: Console, results: Json) -> None:
    """The divergence before and after each phase, how long it took, and the samples of a phase."""
    columns = dict(_columns(results))
    if columns:
        console.print(divergence_table(columns))
    training, phases = results["training"], results.get("phases")
    if training["step"]:
        rate = training["tokens"] / max(training["seconds"], 1e-9)
        trained = f"trained {results['parameters']['trained']:,} parameters for " if phases is None else ""
        phases_done = "" if phases is None else f"{len(phases)} phases: "
        print_line(
            console,
            f"{phases_done}{trained}{training['step']:,} steps, {training['tokens']:,} tokens, "
            f"{training['seconds']:,.0f} s ({rate:,.0f} tokens/s)",
        )
    for sample in results["samples"] if phases is None else ():
        console.print(Text.assemble("\n", (sample["prompt"], "bold"), sample["continuation"], "\n"))


def _columns(results: Json) -> Iterator[tuple[str, Divergence]]:
    """Title and divergence of each measurement, with the length of rows where it is not one for all."""
    phases = results.get("phases")
    if phases is None:
        for name, measured in results["divergence"].items():
            yield name, Divergence(**measured)
        return
    several = len({phase["sequence_length"] for phase in phases}) > 1
    ends = [("before", phases[0], "before"), *((f"after {phase['name']}", phase, "after") for phase in phases)]
    for title, phase, end in ends:
        if end in phase["divergence"]:
            rows = f", rows of {phase['sequence_length']:,}" if several else ""
            yield title + rows, Divergence(**phase["divergence"][end])


def _seeds(config: RunConfig) -> Json:
    """As they were given. Each later phase adds its number to that of the data, and has the sum in its own results."""
    return {
        "training": config.training_args.get("seed", 42),
        "data": config.dataset.seed,
        "samples": None if config.evaluation is None else config.evaluation.seed,
    }


def _made_with(config: RunConfig) -> Json:
    return {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions(),
        "commit": commit(),
        "config": kept_config(config),
    }


def _measured_on(config: RunConfig) -> tuple[object, ...]:
    """All that a divergence depends on, but for the student."""
    dataset = config.dataset.model_dump(
        exclude={"train_dataset", "seed", "num_samples", "prepared_dataset_path", "dataset_num_proc"}
    )
    evaluation = config.evaluation
    return (
        config.sequence_length,
        config.teacher,
        config.dataset.train_dataset if config.teacher.kind == "dataset" else None,  # it holds the teacher's outputs
        dataset,
        None if evaluation is None else (evaluation.dataset, evaluation.num_tokens),
    )


def _phase_row(phase: Phase, results: Json) -> Json:
    return {
        "name": phase.name,
        "folder": f"{PHASES}/{phase.folder.name}",
        "tokens": results["training"]["tokens"],
        "steps": results["training"]["step"],
        "seconds": results["training"]["seconds"],
        "sequence_length": phase.config.sequence_length,
        "losses": results["losses"],
        "loss_functions": [loss.name for loss in phase.config.loss_functions],
        "divergence": results["divergence"],
    }
