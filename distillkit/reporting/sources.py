"""The last sections: what failed, and the commands, versions and machines behind the numbers."""

import json
from collections.abc import Sequence
from typing import Any

import yaml

from distillkit.config.evaluate import SUITES
from distillkit.reporting import numbers
from distillkit.reporting.document import Code, Part, Section, Table
from distillkit.reporting.reading import Evaluation, Json, Results, rows, section


def failure_section(evaluations: Sequence[Evaluation]) -> Section | None:
    """What could not be measured, and why."""
    body = [
        [numbers.one_line(str(row.get(key, numbers.NOTHING))) for key in ("model", "suite", "task", "error")]
        for evaluation in evaluations
        for row in rows(evaluation.content, "failures")
    ]
    if not body:
        return None
    note = "These results are missing above. The same command tries them again and keeps what was measured."
    return Section("Failures", [note, Table(["model", "suite", "task", "error"], body, words=True)])


def sources_section(results: Results) -> Section:
    """The exact command for each number, and what it ran on."""
    parts: list[Part] = []
    sources: list[tuple[str, Json]] = []
    evaluations = ["evaluation"] * len(results.evaluations)
    for name, evaluation in zip(numbers.numbered(evaluations), results.evaluations, strict=True):
        content = evaluation.content
        sources.append((name, content))
        about = [_about(content), *_earlier(content), *_command(content, "evaluate.yaml", "evaluate ")]
        parts.append(Section(name.capitalize(), about))
    for run in results.runs:
        content = {**run.record, **run.results}
        sources.append((run.name, content))
        about_run = f"Measured: losses{', and divergence before and after training' if run.results else ''}."
        parts.append(Section(f"Run {run.name}", [about_run, *_command(content, "run.yaml", "")]))
    return Section("Where the numbers come from", [*parts, _table(sources)])


def facts_of(content: Json, keys: Sequence[str] = ("started", "finished", "commit")) -> list[tuple[str, str]]:
    """Values under some keys, then machine, versions and seeds: what there is of them, as text."""
    by_suite = {suite: section(content, "config", suite).get("seed") for suite in SUITES}  # of an evaluation
    seeds = section(content, "seeds") or by_suite
    found: list[tuple[str, Any]] = [(key, content.get(key)) for key in keys]
    found += [*section(content, "machine").items(), *section(content, "versions").items()]
    found += [(f"seed: {name}", seed) for name, seed in seeds.items()]
    return [(label, str(value)) for label, value in found if value is not None]


def _about(content: Json) -> str:
    suites = ", ".join(suite for suite in SUITES if content.get(suite)) or "nothing"
    models = ", ".join(section(content, "models")) or "no model"
    missing = len(rows(content, "missing"))
    interrupted = f" It was interrupted: {missing} results are missing; the same command adds them." if missing else ""
    return f"Measured: {suites}, of {models}.{interrupted}"


def _earlier(content: Json) -> list[Part]:
    """The results that an evaluation took over from an earlier one of another commit, version or machine."""
    facts = facts_of(content)
    body = [
        [
            *(str(row.get(key, numbers.NOTHING)) for key in ("model", "suite", "task")),
            ", ".join(f"{label} {value}" for label, value in facts_of(row) if (label, value) not in facts),
        ]
        for row in rows(content, "measured_elsewhere")
    ]
    note = "These were measured earlier, with another commit, version or machine than the last table shows:"
    return [note, Table(["model", "suite", "task", "with"], body, words=True)] if body else []


def _command(content: Json, file: str, verb: str) -> list[Part]:
    """The command as it was typed, where it is known; else the one that does the same with the configuration below."""
    command, config = content.get("command"), section(content, "config")
    parts: list[Part] = [Code(command if isinstance(command, str) else f"distillkit {verb}{file}", "sh")]
    if config:
        given = json.loads(json.dumps(config), object_hook=_without_nulls)
        written = yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=100)
        parts.append(Section(f"The whole configuration ({file})", [Code(written, "yaml")], folded=True))
    return parts


def _table(sources: Sequence[tuple[str, Json]]) -> Table:
    facts = [dict(facts_of(content)) for _, content in sources]
    labels = dict.fromkeys(label for each in facts for label in each)
    body = [[label, *(each.get(label, numbers.NOTHING) for each in facts)] for label in labels]
    return Table(["", *(name for name, _ in sources)], body, words=True)


def _without_nulls(mapping: Json) -> Json:
    return {key: value for key, value in mapping.items() if value is not None}
