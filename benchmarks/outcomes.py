"""What the replication keeps of a run and of its evaluations."""

import json
from pathlib import Path
from statistics import median
from typing import Any

from measuring import ROOT

from distillkit.config.evaluate import TEACHER
from distillkit.runs.metrics import NOT_LOSSES

POINTS = 40
"""Of a curve; more than a picture shows are not kept."""

OF_A_RUN = ("command", "commit", "machine", "versions", "seconds_in_all", "note")
"""What is kept of a run with whose student another goes on."""

Json = dict[str, Any]


def part_of(name: str, folder: Path, plan: Json) -> Json:
    """What the files of a run and of its evaluations tell, without paths of the machine."""
    found = {
        file.removesuffix(".yaml"): json.loads((folder / file.removesuffix(".yaml") / "results.json").read_text())
        for file in plan["files"]
        if file != "run.yaml"
    }
    failures = [failure for results in found.values() for failure in results["failures"]]
    of_needles = [results for file, results in found.items() if file.startswith("needles")]
    tasks_of: Json = {}
    for results in of_needles:
        for model, tasks in results["needles"].items():
            tasks_of.setdefault(model, {}).update(tasks)
    needles = {
        "needles": {model: by_length(tasks) for model, tasks in tasks_of.items()},
        "needles_by_depth": {model: by_depth(tasks) for model, tasks in tasks_of.items()},
    }
    trained = {model: each["trained_length"] for results in of_needles for model, each in results["models"].items()}
    if name == TEACHER:
        of_teacher = {key: by_model[TEACHER] for key, by_model in needles.items()}
        return {**of_teacher, "trained_length": trained[TEACHER], "failures": failures}
    run = json.loads((folder / "run" / "results.json").read_text())
    phases = [phase_of(folder / "run" / phase["folder"], phase) for phase in run["phases"]]
    training = run["training"]
    return {
        "recipe": plan["files"]["run.yaml"]["extends"].removeprefix(f"{ROOT}/"),
        "overrides": plan["overrides"],
        "student": run["config"]["student"],
        "tokens": training["tokens"],
        "seconds": training["seconds"],
        "parameters": run["parameters"],
        "device": run["machine"]["device"],
        "phases": phases,
        "divergence": {
            each.partition("-")[2]: results["divergence"]
            for each, results in found.items()
            if each.startswith("divergence")
        },
        "trained_length": trained,
        **needles,
        "failures": failures,
    }


def continued(former: Json, part: Json) -> Json:
    """A variant with whose student another run went on: the phases of both, and the rest as it was measured last."""
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
    config = results["config"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    training = config["training_args"]
    names = ("per_device_train_batch_size", "learning_rate", "lr_scheduler_type", "torch_compile")
    curve = [
        {
            name: rounded(value)
            for name, value in line.items()
            if name in ("tokens", "seconds") or name not in NOT_LOSSES
        }
        for line in thinned(steps)
    ]
    held_out = [{**phase["divergence"]["before"], "tokens": 0}] if "before" in phase["divergence"] else []
    for line in lines:
        if "eval_kl" in line:
            told = {key.removeprefix("eval_"): rounded(value) for key, value in line.items() if key.startswith("eval_")}
            held_out.append({**told, "tokens": round(phase["tokens"] * line["step"] / phase["steps"])})
    return {
        **{key: phase[key] for key in ("name", "tokens", "steps", "seconds", "sequence_length", "losses")},
        "tokens_per_second": round(median(line["tokens_per_second"] for line in steps[1:] or steps)),
        "loss_functions": [
            {key: value for key, value in loss.items() if key in ("function", "weight", "temperature")}
            for loss in config["loss_functions"]
        ],
        "trained_parameters": results["parameters"]["trained"],
        "training_args": {name: training[name] for name in names if name in training},
        "divergence": phase["divergence"],
        "held_out": held_out,
        "curve": curve,
    }


def by_length(tasks: Json) -> Json:
    """Of each task `correct` and `total` by length, over all depths."""
    sums: Json = {}
    for task, rows in tasks.items():
        for row in rows:
            found = sums.setdefault(task, {}).setdefault(str(row["length"]), {"correct": 0.0, "total": 0})
            found["correct"] += row["correct"]
            found["total"] += row["total"]
    return sums


def by_depth(tasks: Json) -> Json:
    """Of each task and length `[correct, total]` by depth, the share of the prompt before the needle."""
    found: Json = {}
    for task, rows in tasks.items():
        for row in rows:
            of_length = found.setdefault(task, {}).setdefault(str(row["length"]), {})
            of_length[str(row["depth"])] = [row["correct"], row["total"]]
    return found


def thinned(lines: list[Json]) -> list[Json]:
    """The first, the last and some between them."""
    step = max(1, -(-len(lines) // POINTS))
    kept = lines[::step]
    return kept if not lines or kept[-1] is lines[-1] else [*kept, lines[-1]]


def rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
