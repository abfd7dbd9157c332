"""What the replication keeps of a run and of its evaluations."""

import json
from pathlib import Path
from statistics import median
from typing import Any

from distillkit.config.evaluate import TEACHER
from frame import ROOT, Json, read_metrics

OF_A_RUN = ("command", "commit", "machine", "versions", "seconds_in_all", "note")
"""What is kept of a run if another continues with its student."""


def part_of(name: str, folder: Path, plan: Json) -> Json:
    """What the files of a run and of its evaluations tell, without paths of the machine."""
    files = [Path(file).stem for file in plan["files"] if file != "run.yaml"]
    found = {file: json.loads((folder / file / "results.json").read_text()) for file in files}
    of_needles = found["needles"]["needles"]
    part = {
        "trained_length": {name: model["trained_length"] for name, model in found["needles"]["models"].items()},
        "needles": {model: by_length(tasks) for model, tasks in of_needles.items()},
        "needles_by_depth": {model: by_depth(tasks) for model, tasks in of_needles.items()},
    }
    failures = [failure for results in found.values() for failure in results["failures"]]
    if name == TEACHER:
        return {**{key: by_model[TEACHER] for key, by_model in part.items()}, "failures": failures}
    run = json.loads((folder / "run" / "results.json").read_text())
    divergences = {file.partition("-")[2]: each["divergence"] for file, each in found.items() if "divergence-" in file}
    return {
        "recipe": plan["files"]["run.yaml"]["extends"].removeprefix(f"{ROOT}/"),
        "overrides": plan["overrides"],
        "student": run["config"]["student"],
        "tokens": run["training"]["tokens"],
        "seconds": run["training"]["seconds"],
        "parameters": run["parameters"],
        "device": run["machine"]["device"],
        "phases": [phase_of(folder / "run" / phase["folder"], phase) for phase in run["phases"]],
        "divergence": divergences,
        **part,
        "failures": failures,
    }


def continued(former: Json, part: Json) -> Json:
    """A variant with whose student another run continued: the phases of both, and the rest as it was measured last."""
    own = [phase["name"] for phase in part["phases"]]
    phases = [*(phase for phase in former["phases"] if phase["name"] not in own), *part["phases"]]
    return {
        **part,
        **{key: sum(phase[key] for phase in phases) for key in ("tokens", "seconds")},
        "overrides": [*dict.fromkeys([*former["overrides"], *part["overrides"]])],
        "student": former["student"],
        "phases": phases,
        "before": former.get("before") or {key: former[key] for key in OF_A_RUN if key in former},
    }


def phase_of(folder: Path, phase: Json) -> Json:
    """What a phase was, and how it went. `held_out`: its divergence at some of its steps, in rows of its length."""
    results = json.loads((folder / "results.json").read_text())
    config, training = results["config"], results["config"]["training_args"]
    lines = read_metrics(folder)
    steps = [line for line in lines if "loss" in line]
    names = ("per_device_train_batch_size", "learning_rate", "lr_scheduler_type", "torch_compile")
    held_out = [{**phase["divergence"]["before"], "tokens": 0}] if "before" in phase["divergence"] else []
    for line in (line for line in lines if "eval_kl" in line):
        at = {name.removeprefix("eval_"): rounded(value) for name, value in line.items() if name.startswith("eval_")}
        held_out.append({**at, "tokens": round(phase["tokens"] * line["step"] / phase["steps"])})
    return {
        **{key: phase[key] for key in ("name", "tokens", "steps", "seconds", "sequence_length", "losses")},
        "tokens_per_second": round(median(line["tokens_per_second"] for line in steps[1:] or steps)),
        "loss_functions": [
            {key: loss[key] for key in ("function", "weight", "temperature") if key in loss}
            for loss in config["loss_functions"]
        ],
        "trained_parameters": results["parameters"]["trained"],
        "training_args": {name: training[name] for name in names if name in training},
        "divergence": phase["divergence"],
        "held_out": held_out,
    }


def by_length(tasks: Json) -> Json:
    """Of each task `correct` and `total` by length, over all depths."""
    found: Json = {}
    for task, rows in tasks.items():
        for row in rows:
            sums = found.setdefault(task, {}).setdefault(str(row["length"]), {"correct": 0.0, "total": 0})
            for key in sums:
                sums[key] += row[key]
    return found


def by_depth(tasks: Json) -> Json:
    """Of each task and length `[correct, total]` by depth, the share of the prompt before the needle."""
    found: Json = {}
    for task, rows in tasks.items():
        for row in rows:
            depths = found.setdefault(task, {}).setdefault(str(row["length"]), {})
            depths[str(row["depth"])] = [row["correct"], row["total"]]
    return found


def rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
