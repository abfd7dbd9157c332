"""`results.json` of an evaluation, and what it says in a few lines."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distillkit.config.evaluate import TEACHER, EvaluateConfig, ModelConfig
from distillkit.console import print_line
from distillkit.evaluation.divergence import shown
from distillkit.evaluation.model_spec import trained_length
from distillkit.evaluation.units import Measured, Unit
from distillkit.reporting.reading import EVALUATION, FORMAT
from distillkit.runs.names import RESULTS
from distillkit.runs.writing import write_json

FAILURES = "failures.log"

Json = dict[str, Any]


def write_results(
    folder: Path,
    about: Mapping[str, Any],
    config: EvaluateConfig,
    found: Mapping[Unit, Measured],
    failures: Mapping[Unit, str],
    missing: Sequence[Unit],
    made_with: Json,
) -> Json:
    """Write `results.json`: what was measured, of what, with what, and what could not be measured.

    Args:
        about: when the evaluation started, its command and configuration.
        missing: what was not tried, because the evaluation was interrupted; it has not finished then.
        made_with: versions, commit and machine of this process; results that others have made are listed.
    """
    suites: dict[str, Json] = {name: {} for name in ("model", "divergence", "benchmarks", "needles", "speed")}
    for unit, measured in found.items():
        of_suite, result = suites[unit.suite], measured.result
        if unit.suite in ("model", "divergence"):
            of_suite[unit.model] = result
        elif unit.suite == "speed":
            of_suite.setdefault(unit.model, []).append(result)
        elif unit.suite == "benchmarks":
            of_suite.setdefault(unit.model, {}).update(result)
        else:
            task = unit.task.partition("@")[0]
            of_suite.setdefault(unit.model, {}).setdefault(task, []).extend(result)
    described = suites.pop("model")
    models = {name: _model(name, model, described.get(name, {})) for name, model in _models(config)}
    results = {
        "kind": EVALUATION,
        "format": FORMAT,
        "started": about["started"],
        "finished": None if missing else time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": about["command"],
        **made_with,
        "config": about["config"],
        "models": models,
        **suites,
        "failures": [{**_named(unit), "error": error} for unit, error in failures.items()],
        "missing": [_named(unit) for unit in missing],
        "measured_elsewhere": [
            {**_named(unit), **measured.made_with}
            for unit, measured in found.items()
            if unit.suite != "model" and measured.made_with != made_with
        ],
    }
    write_json(folder / RESULTS, results)
    return results


def print_results(console: Console, results: Json, folder: Path) -> None:
    """The main numbers as a table, and where everything is."""
    table = Table(title_justify="left")
    table.add_column("")
    for name in results["models"]:
        table.add_column(name, justify="right")
    for label, cells in _rows(results):
        if cells:
            table.add_row(label, *(cells.get(name, "-") for name in results["models"]))
    console.print(table)
    for failure in results["failures"]:
        unit = " ".join(part for part in (failure["model"], failure["suite"], failure["task"]) if part)
        print_line(console, f"failed: {unit}: {failure['error']}")
    if elsewhere := len(results["measured_elsewhere"]):
        print_line(console, f"{elsewhere} results are of another commit, version or machine; {RESULTS} tells which")
    if results["failures"]:
        print_line(console, f"tracebacks are in {folder / FAILURES}; the same command tries again what failed")
    print_line(console, f"results are in {folder / RESULTS}; distillkit report {folder} makes a report of them")


def _named(unit: Unit) -> Json:
    return {"model": unit.model, "suite": unit.suite, "task": unit.task}


def _models(config: EvaluateConfig) -> Iterator[tuple[str, ModelConfig]]:
    if config.teacher is not None:
        yield TEACHER, config.teacher
    yield from config.students.items()


def _model(name: str, config: ModelConfig, described: Mapping[str, Any]) -> Json:
    return {
        "role": "teacher" if name == TEACHER else "student",
        "path": config.path,
        "parameters": described.get("parameters"),
        "model_type": described.get("model_type"),
        "layers": described.get("layers"),
        "trained_length": trained_length(config, described.get("max_position_embeddings")),
    }


def _rows(results: Json) -> Iterator[tuple[str, dict[str, str]]]:
    """Label, and cells by model."""
    divergence = results["divergence"]
    for key, label, form in (
        ("kl", "KL(teacher‖student), nats per token", ".4f"),
        ("agreement", "same likeliest token", ".1%"),
        ("agreement_top5", "teacher's likeliest in the student's top 5", ".1%"),
        ("student_perplexity", "perplexity", ".2f"),
        ("student_ece", "calibration error", ".3f"),
    ):
        cells = {name: shown(each[key], form) for name, each in divergence.items()}
        of_teacher = key.replace("student_", "teacher_")
        if divergence and of_teacher != key:
            cells[TEACHER] = shown(next(iter(divergence.values()))[of_teacher], form)
        yield label, cells
    benchmarks = results["benchmarks"]
    for task in dict.fromkeys(task for each in benchmarks.values() for task in each):
        for metric in dict.fromkeys(
            metric for each in benchmarks.values() for metric in each.get(task, {}).get("metrics", {})
        ):
            scores = {name: each[task]["metrics"].get(metric) for name, each in benchmarks.items() if task in each}
            yield f"{task}, {metric}", {name: shown(each["value"], ".3f") for name, each in scores.items() if each}
    needles = results["needles"]
    for task in dict.fromkeys(task for each in needles.values() for task in each):
        yield task, {name: _share(each[task]) for name, each in needles.items() if task in each}
    for key, label in (("prefill_tokens_per_second", "prefill"), ("decode_tokens_per_second", "decode")):
        for context in dict.fromkeys(row["context"] for rows in results["speed"].values() for row in rows):
            at = {
                name: row[key] for name, rows in results["speed"].items() for row in rows if row["context"] == context
            }
            yield f"{label} at {context:,} tokens, tokens/s", {name: shown(rate, ",.1f") for name, rate in at.items()}


def _share(rows: list[Json]) -> str:
    return f"{sum(row['correct'] for row in rows) / sum(row['total'] for row in rows):.1%}"
