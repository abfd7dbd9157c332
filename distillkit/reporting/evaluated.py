"""Several evaluations as one list of models, each with everything that was measured of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distillkit.reporting.colours import series
from distillkit.reporting.numbers import numbered, slug
from distillkit.reporting.reading import Evaluation, Json, number, rows, section

Z_95 = 1.96
"""Standard errors that a difference of chance stays within in 95 of 100 cases."""


@dataclass
class Model:
    """A teacher or student. `about`: as the result file describes it. The suites are empty where nothing was measured.

    slug: a name for files, of no other model. bases: folders that a relative `path` may be in. whole_tasks: the
    requested benchmarks, without the subtasks of groups.
    """

    name: str
    role: str
    path: str
    about: Json
    colour: str = "teacher"
    divergence: Json = field(default_factory=dict)
    generation: Json = field(default_factory=dict)
    benchmarks: dict[str, Json] = field(default_factory=dict)
    needles: dict[str, list[Json]] = field(default_factory=dict)
    long_context: Json = field(default_factory=dict)
    speed: list[Json] = field(default_factory=list)
    slug: str = ""
    bases: list[Path] = field(default_factory=list)
    whole_tasks: list[str] = field(default_factory=list)

    @property
    def is_teacher(self) -> bool:
        return self.role == "teacher"

    def lies_in(self, folder: Path) -> bool:
        """Whether these are the weights in a folder."""
        path = Path(self.path).expanduser()
        return any((base / path).resolve() == folder.resolve() for base in self.bases)


def merge_models(evaluations: Sequence[Evaluation]) -> list[Model]:
    """The teacher first, then students in the order in which they occur.

    The same name and path is the same model. A later file adds to an earlier one, and replaces what both measured (of
    needles: the same task, length and depth; of last words: the same distance). Models of one name and different paths
    show their paths.
    """
    models: dict[tuple[str, str], Model] = {}
    for evaluation in evaluations:
        for name in section(evaluation.content, "models"):
            about = section(evaluation.content, "models", name)
            path = str(about.get("path"))
            model = models.setdefault((name, path), Model(name, str(about.get("role", "student")), path, about))
            _add(model, evaluation, name)
    ordered = sorted(models.values(), key=lambda model: not model.is_teacher)
    names = [model.name for model in ordered]
    for model in ordered:
        model.name += f" ({Path(model.path).name})" if names.count(model.name) > 1 else ""
    slugs: list[str] = []
    for position, (model, name) in enumerate(zip(ordered, numbered([each.name for each in ordered]), strict=True), 1):
        model.name = name
        model.slug = slug(name) if slug(name) not in ["", *slugs] else slug(name, str(position))
        slugs.append(model.slug)
    for index, model in enumerate(model for model in ordered if not model.is_teacher):
        model.colour = series(index)
    return ordered


def the_teacher(models: Sequence[Model]) -> Model | None:
    """The one model that the others are compared with; None where there is none, or several."""
    teachers = [model for model in models if model.is_teacher]
    return teachers[0] if len(teachers) == 1 else None


def common_tasks(models: Sequence[Model]) -> list[str]:
    """The tasks that every model with needles has: only over those are means comparable."""
    measured = [model.needles for model in models if model.needles]
    return [task for task in measured[0] if all(task in each for each in measured)] if measured else []


def lengths(models: Sequence[Model], tasks: Sequence[str]) -> list[int]:
    """The lengths that were measured in any of the tasks, in tokens."""
    return sorted({int(row["length"]) for model in models for row in needle_rows(model, tasks)})


def score(model: Model, tasks: Sequence[str], length: int, depth: float | None = None) -> tuple[float, float] | None:
    """Mean score at a length (and depth) over samples of the tasks, and its standard error at most; None if unmeasured.

    A sample's score is a share, and only sums are known. Scores between 0 and 1 with mean p have a variance of at most
    p (1 - p). The error is that of Agresti and Coull (1998), as if there were 1.96² more samples, half of them right:
    so it is above 0 for a mean of 0 or 1 too.
    """
    found = [
        row for row in needle_rows(model, tasks) if row["length"] == length and (depth is None or row["depth"] == depth)
    ]
    total = sum(row["total"] for row in found)
    if not total:
        return None
    correct = sum(row["correct"] for row in found)
    samples = total + Z_95**2
    share = (correct + Z_95**2 / 2) / samples
    return correct / total, math.sqrt(max(share * (1 - share), 0) / samples)


def needle_rows(model: Model, tasks: Sequence[str]) -> list[Json]:
    return [row for task in tasks for row in model.needles.get(task, [])]


def _add(model: Model, evaluation: Evaluation, name: str) -> None:
    content = evaluation.content
    # A path is relative to where the evaluation was started: here, or above the folder of its results.
    model.bases += [Path.cwd(), *evaluation.path.resolve().parents]
    model.divergence.update(section(content, "divergence", name))
    model.generation.update(section(content, "generation", name))
    benchmarks = {task: section(content, "benchmarks", name, task) for task in section(content, "benchmarks", name)}
    model.benchmarks.update(benchmarks)
    model.whole_tasks += [task for task in _whole_tasks(content, benchmarks) if task not in model.whole_tasks]
    for task in section(content, "needles", name):
        found = [*model.needles.get(task, []), *rows(content, "needles", name, task)]
        model.needles[task] = _latest(found, ["length", "depth"], needed=["length", "depth", "correct", "total"])
    words = [*rows(model.long_context, "last_word"), *rows(content, "long_context", name, "last_word")]
    model.long_context.update(section(content, "long_context", name))
    model.long_context["last_word"] = _latest(words, ["distance"], needed=["distance", "accuracy"])
    documents = section(model.long_context, "documents")
    positions = _latest(rows(documents, "positions"), ["from", "to"], needed=["from", "to", "perplexity"])
    model.long_context["documents"] = {**documents, "positions": positions}
    speed = [{**row, "cache_and_state_bytes": _cache_and_state(row)} for row in rows(content, "speed", name)]
    model.speed = _latest([*model.speed, *speed], ["context"], needed=["context"])


def _whole_tasks(content: Json, measured: Json) -> list[str]:
    """The requested tasks; all that were measured where a name stands for several, as a tag does."""
    requested = section(content, "config", "benchmarks").get("tasks")
    failed = [row.get("task") for row in rows(content, "failures")]
    if not isinstance(requested, list) or not all(task in measured or task in failed for task in map(str, requested)):
        return list(measured)
    return [task for task in map(str, requested) if task in measured]


def _latest(found: Sequence[Json], keys: Sequence[str], needed: Sequence[str]) -> list[Json]:
    """The last row for each value of the keys, in ascending order; rows that lack a needed number are left out."""
    whole = [row for row in found if all(_is_finite(number(row, key)) for key in needed)]
    by_keys = {tuple(float(row[key]) for key in keys): row for row in whole}
    return [by_keys[values] for values in sorted(by_keys)]


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _cache_and_state(row: Json) -> float | None:
    """Bytes that a model keeps of a context."""
    parts = [number(row, key) for key in ("kv_cache_bytes", "state_bytes")]
    return None if all(part is None for part in parts) else sum(part or 0 for part in parts)
