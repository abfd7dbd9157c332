"""The last sections: what failed, and the commands, versions and machines behind the numbers."""

import json
from collections.abc import Sequence
from typing import Any

import yaml

from distillkit.reporting import numbers
from distillkit.reporting.document import Cell, Code, Details, Heading, Paragraph, Part, Section, Table, cells
from distillkit.reporting.reading import Evaluation, Json, Results, Run, rows, section
from distillkit.reporting.training import run_names

SUITES = ("divergence", "benchmarks", "needles", "speed")


def failure_section(evaluations: Sequence[Evaluation]) -> Section | None:
    """What could not be measured, and why."""
    body = [
        cells(*(numbers.one_line(str(row.get(key, numbers.NOTHING))) for key in ("model", "suite", "task", "error")))
        for evaluation in evaluations
        for row in rows(evaluation.content, "failures")
    ]
    if not body:
        return None
    note = Paragraph("These are missing above; the same command tries them again and keeps what was measured.")
    return Section("Failures", [note, Table(["model", "suite", "task", "error"], body, words=True)])


def provenance_section(results: Results) -> Section:
    """The exact command for each number, and what it ran on."""
    parts: list[Part] = []
    sources: list[tuple[str, Json]] = []
    several = len(results.evaluations) > 1
    for position, evaluation in enumerate(results.evaluations, 1):
        name = f"evaluation {position}" if several else "evaluation"
        sources.append((name, evaluation.content))
        parts += [
            Heading(name.capitalize()),
            Paragraph(_what_it_gives(evaluation.content)),
            *_elsewhere(evaluation.content),
            *_command(evaluation.content, "evaluate.yaml", "evaluate "),
        ]
    for run, name in zip(results.runs, run_names(results.runs), strict=True):
        content = {**run.record, **run.results}
        sources.append((name, content))
        parts += [Heading(f"Run {name}"), Paragraph(_what_a_run_gives(run)), *_command(content, "run.yaml", "")]
    return Section("Where the numbers come from", [*parts, _table(sources)])


def configuration_yaml(config: Json) -> str:
    """A configuration that was written down with all defaults, as YAML; what is null is left out."""
    return yaml.safe_dump(_without_nulls(config), sort_keys=False, allow_unicode=True, width=100)


def _what_it_gives(content: Json) -> str:
    suites = [suite for suite in SUITES if content.get(suite)]
    told = ", ".join(section(content, "models"))
    missing = len(rows(content, "missing"))
    interrupted = f" It was interrupted: {missing} results are missing, which the same command adds." if missing else ""
    return f"Gives {', '.join(suites) or 'nothing'} of {told or 'no model'}.{interrupted}"


def _elsewhere(content: Json) -> list[Part]:
    """The results that an evaluation had already, where they were made with something else than the rest."""
    facts = _facts(content)
    body = [
        cells(
            *(str(row.get(key, numbers.NOTHING)) for key in ("model", "suite", "task")),
            ", ".join(f"{label} {value}" for label, value in _facts(row) if (label, value) not in facts),
        )
        for row in rows(content, "measured_elsewhere")
    ]
    note = Paragraph("These were measured before, with something else than the table at the end says:")
    return [note, Table(["model", "suite", "task", "with"], body, words=True)] if body else []


def _what_a_run_gives(run: Run) -> str:
    return "Gives the losses" + (", and the divergence before and after training." if run.results else ".")


def _command(content: Json, file: str, verb: str) -> list[Part]:
    """The command as it was typed, where it is known; else the one that does the same with the configuration below."""
    command, config = content.get("command"), section(content, "config")
    parts: list[Part] = [Code(command if isinstance(command, str) else f"distillkit {verb}{file}", "sh")]
    if config:
        parts.append(Details(f"The whole configuration ({file})", [Code(configuration_yaml(config), "yaml")]))
    return parts


def _table(sources: Sequence[tuple[str, Json]]) -> Table:
    facts: dict[str, list[str]] = {}
    for position, (_, content) in enumerate(sources):
        for label, value in _facts(content):
            facts.setdefault(label, [numbers.NOTHING] * len(sources))[position] = value
    body = [[Cell(label), *(Cell(value) for value in values)] for label, values in facts.items()]
    return Table(["", *(name for name, _ in sources)], body, words=True)


def _facts(content: Json) -> list[tuple[str, str]]:
    found: list[tuple[str, Any]] = [(key, content.get(key)) for key in ("started", "finished", "commit")]
    found += section(content, "machine").items()
    found += section(content, "versions").items()
    found += [(f"seed: {name}", value) for name, value in (section(content, "seeds") or _seeds(content)).items()]
    return [(label, str(value)) for label, value in found if value is not None]


def _seeds(content: Json) -> Json:
    """The seeds in a configuration that gives them by suite."""
    config = section(content, "config")
    return {suite: section(config, suite)["seed"] for suite in SUITES if "seed" in section(config, suite)}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool) or value is None else json.dumps(value)
