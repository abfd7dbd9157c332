"""`results.json` of an evaluation, and its main numbers as a table."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distillkit.config.evaluate import SUITES, TEACHER, EvaluateConfig, ModelConfig
from distillkit.console import print_line
from distillkit.evaluation.local_benchmarks import LOCAL_TASKS
from distillkit.evaluation.model_spec import trained_length
from distillkit.evaluation.units import DOCUMENTS, LAST_WORD, Unit, UnitResult
from distillkit.formatting import number_text
from distillkit.reporting.comparison import KL
from distillkit.reporting.evaluated import merge_models, the_teacher
from distillkit.reporting.reading import EVALUATION, FORMAT, Evaluation
from distillkit.reporting.shares import pairable_tasks, paired_over
from distillkit.runs.names import RESULTS
from distillkit.runs.writing import write_json

FAILURES = "failures.log"

Json = dict[str, Any]


def write_results(
    folder: Path,
    about: Mapping[str, Any],
    config: EvaluateConfig,
    found: Mapping[Unit, UnitResult],
    failures: Mapping[Unit, str],
    missing: Sequence[Unit],
    made_with: Json,
) -> Json:
    """Write `results.json`: the results, their models and provenance, and what could not be measured.

    Args:
        about: start time, command and configuration of the evaluation.
        missing: units that were not measured because the evaluation was interrupted.
        made_with: versions, commit and machine of this process; results with others are listed.
    """
    suites: dict[str, Json] = {name: {} for name in ("model", *SUITES)}
    for unit, measured in found.items():
        suite, result = suites[unit.suite], measured.result
        if unit.suite in ("model", "divergence"):
            suite[unit.model] = result
        elif unit.suite == "speed":
            suite.setdefault(unit.model, []).append(result)
        elif unit.suite == "generation":
            suite.setdefault(unit.model, {})[unit.task] = result
        elif unit.suite == "benchmarks":
            suite.setdefault(unit.model, {}).update(result)
        elif unit.suite == "long_context" and unit.task.startswith(LAST_WORD):
            suite.setdefault(unit.model, {}).setdefault(LAST_WORD, []).append(result)
        elif unit.suite == "long_context":
            suite.setdefault(unit.model, {})[unit.task] = result
        else:
            task = unit.task.partition("@")[0]
            suite.setdefault(unit.model, {}).setdefault(task, []).extend(result)
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
    """Print the main numbers as a table, failures, and where the files are."""
    table = Table(title_justify="left")
    table.add_column("")
    for name in results["models"]:
        table.add_column(name, justify="right")
    for label, cells in _rows(results):
        if cells:
            table.add_row(label, *(cells.get(name, "-") for name in results["models"]))
    console.print(table)
    scores = [each for model in results["benchmarks"].values() for each in model.items()]
    for task, note in {task: each["note"] for task, each in scores if task in LOCAL_TASKS and "note" in each}.items():
        print_line(console, f"{task} is not the hub's: {note}")
    for failure in results["failures"]:
        unit = " ".join(part for part in (failure["model"], failure["suite"], failure["task"]) if part)
        print_line(console, f"failed: {unit}: {failure['error']}")
    if elsewhere := len(results["measured_elsewhere"]):
        print_line(
            console, f"{elsewhere} results were made by another commit, version or machine; {RESULTS} lists them"
        )
    if results["failures"]:
        print_line(console, f"tracebacks are in {folder / FAILURES}; the same command tries them again")
    print_line(console, f"results are in {folder / RESULTS}; distillkit report {folder} makes a report")


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
    """Label of each row, and its cells by model."""
    divergence = results["divergence"]
    for key, label, form in (
        ("kl", KL, ".4f"),
        ("agreement", "same likeliest token", ".1%"),
        ("agreement_top5", "teacher's likeliest in the student's top 5", ".1%"),
        ("student_perplexity", "perplexity", ".2f"),
        ("student_ece", "calibration error", ".3f"),
    ):
        cells = {name: number_text(each[key], form) for name, each in divergence.items()}
        teacher_key = key.replace("student_", "teacher_")
        if divergence and teacher_key != key:
            cells[TEACHER] = number_text(next(iter(divergence.values()))[teacher_key], form)
        yield label, cells
    for task, key, label, form in (
        ("choices", "letter_accuracy", "right by the likeliest letter", ".1%"),
        ("choices", "cloze_accuracy", "right by the likeliest text", ".1%"),
        ("choices", "unparsed", "written answers that are no letter", ".1%"),
        ("continuations", "agreement", "greedy tokens equal to the teacher's", ".1%"),
        ("continuations", "log_probability", "teacher's log-probability of a sampled token", ".3f"),
    ):
        measured = {name: each[task] for name, each in results["generation"].items() if key in each.get(task, {})}
        yield label, {name: number_text(each[key], form) for name, each in measured.items()}
    benchmarks = results["benchmarks"]
    for task in dict.fromkeys(task for each in benchmarks.values() for task in each):
        for metric in dict.fromkeys(
            metric for each in benchmarks.values() for metric in each.get(task, {}).get("metrics", {})
        ):
            scores = {name: each[task]["metrics"].get(metric) for name, each in benchmarks.items() if task in each}
            yield (
                f"{task}, {metric}",
                {name: number_text(each["value"], ".3f") for name, each in scores.items() if each},
            )
    yield from _pairs(results)
    needles = results["needles"]
    for task in dict.fromkeys(task for each in needles.values() for task in each):
        yield task, {name: _share(each[task]) for name, each in needles.items() if task in each}
    yield from _long_context(results["long_context"])
    for key, label in (("prefill_tokens_per_second", "prefill"), ("decode_tokens_per_second", "decode")):
        for context in dict.fromkeys(row["context"] for rows in results["speed"].values() for row in rows):
            at = {
                name: row[key] for name, rows in results["speed"].items() for row in rows if row["context"] == context
            }
            yield (
                f"{label} at {context:,} tokens, tokens/s",
                {name: number_text(rate, ",.1f") for name, rate in at.items()},
            )


def _pairs(results: Json) -> Iterator[tuple[str, dict[str, str]]]:
    """Students beside the teacher, item by item, as the report has it."""
    models = merge_models([Evaluation(Path(), results)])
    teacher = the_teacher(models)
    tasks = [] if teacher is None else pairable_tasks(models, teacher)
    for label, some in ((f"{len(tasks)} tasks", tasks), *((task, [task]) for task in tasks)):
        if teacher is not None and some and (label in tasks or len(tasks) > 1):
            pairs = {model.name: paired_over(model, teacher, some) for model in models if not model.is_teacher}
            cells = {
                name: f"{each.not_worse:.1%} (+{each.win:.1%} -{each.loss:.1%})" for name, each in pairs.items() if each
            }
            yield f"{label}, at least as right as the teacher (more, less)", cells


def _long_context(measured: Json) -> Iterator[tuple[str, dict[str, str]]]:
    positions = {name: each[DOCUMENTS]["positions"] for name, each in measured.items() if DOCUMENTS in each}
    buckets = dict.fromkeys((row["from"], row["to"]) for rows in positions.values() for row in rows)
    for key, label, form in (("perplexity", "perplexity", ".2f"), ("kl", "KL(teacher‖student)", ".4f")):
        for bucket in buckets:
            at = {name: row for name, rows in positions.items() for row in rows if (row["from"], row["to"]) == bucket}
            cells = {name: number_text(row[key], form) for name, row in at.items() if key in row}
            yield f"long documents, {bucket[0]:,} to {bucket[1]:,}: {label}", cells
    words = {name: each[LAST_WORD] for name, each in measured.items() if LAST_WORD in each}
    for distance in dict.fromkeys(row["distance"] for rows in words.values() for row in rows):
        at = {name: row for name, rows in words.items() for row in rows if row["distance"] == distance}
        for key, label, form in (
            ("accuracy", "", ".1%"),
            ("accuracy_without", ", without the passage's beginning", ".1%"),
            ("gain", ", nats that the beginning adds", ".2f"),
        ):
            cells = {name: number_text(row[key], form) for name, row in at.items()}
            yield f"last word at {distance:,} tokens{label}", cells


def _share(rows: list[Json]) -> str:
    return f"{sum(row['correct'] for row in rows) / sum(row['total'] for row in rows):.1%}"
