"""Several evaluations as one list of models, each with all that was measured of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distillkit.reporting.colours import series
from distillkit.reporting.numbers import slug
from distillkit.reporting.reading import Evaluation, Json, number, rows, section


@dataclass
class Model:
    """A teacher or student. `about`: as the result file describes it; the rest empty where it was not measured.

    slug: a name for files, of no other model. bases: folders that a relative `path` may be in. whole_tasks: the
    benchmarks that were asked for, without the subtasks of groups.
    """

    name: str
    role: str
    path: str
    about: Json
    colour: str = "teacher"
    divergence: Json = field(default_factory=dict)
    benchmarks: dict[str, Json] = field(default_factory=dict)
    needles: dict[str, list[Json]] = field(default_factory=dict)
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
    """The teacher first, then students in the order in which they are met.

    A name with the same path is the same model: what a later file measured of it adds to the earlier, and replaces it
    where both measured the same (of needles: the same task, length and depth). A name that stands for another path is
    told apart by that path.
    """
    models: dict[tuple[str, str], Model] = {}
    for evaluation in evaluations:
        content = evaluation.content
        for name in section(content, "models"):
            about = section(section(content, "models"), name)
            path = str(about.get("path"))
            key = (name, path)
            if key not in models:
                models[key] = Model(name, str(about.get("role", "student")), path, about)
            _add(models[key], evaluation, name)
    ordered = sorted(models.values(), key=lambda model: not model.is_teacher)
    for index, model in enumerate(model for model in ordered if not model.is_teacher):
        model.colour = series(index)
    _tell_apart(ordered)
    for position, model in enumerate(ordered, 1):
        model.slug = slug(model.name)
        if not model.slug or any(model.slug == earlier.slug for earlier in ordered[: position - 1]):
            model.slug = slug(model.name, str(position))
    return ordered


def the_teacher(models: Sequence[Model]) -> Model | None:
    """The one model that the others are compared with; None where there is none, or several."""
    teachers = [model for model in models if model.is_teacher]
    return teachers[0] if len(teachers) == 1 else None


def _add(model: Model, evaluation: Evaluation, name: str) -> None:
    content = evaluation.content
    # A path is relative to where the evaluation was started: here, or above the folder of its results.
    model.bases += [Path.cwd(), *evaluation.path.resolve().parents]
    model.divergence.update(section(section(content, "divergence"), name))
    measured = section(section(content, "benchmarks"), name)
    benchmarks = {task: section(measured, task) for task in measured}
    model.benchmarks.update(benchmarks)
    model.whole_tasks += [task for task in _whole_tasks(content, benchmarks) if task not in model.whole_tasks]
    needles = section(section(content, "needles"), name)
    for task in needles:
        model.needles[task] = _renewed(model.needles.get(task, []), rows(needles, task), ("length", "depth"))
    model.speed = _renewed(model.speed, rows(section(content, "speed"), name), ("context",))


def _whole_tasks(content: Json, measured: Json) -> list[str]:
    """The tasks that were asked for; all that were measured where a name stands for several, as a tag does."""
    asked = section(section(content, "config"), "benchmarks").get("tasks")
    failed = [row.get("task") for row in rows(content, "failures")]
    if not isinstance(asked, list) or not all(task in measured or task in failed for task in map(str, asked)):
        return list(measured)
    return [task for task in map(str, asked) if task in measured]


def _renewed(earlier: Sequence[Json], later: Sequence[Json], keys: Sequence[str]) -> list[Json]:
    """Rows by their keys, in ascending order; a later one replaces an earlier."""
    found: dict[tuple[float, ...], Json] = {}
    for row in (*earlier, *later):
        where = tuple(value for key in keys if (value := number(row, key)) is not None)
        if len(where) == len(keys):
            found[where] = row
    return [found[where] for where in sorted(found)]


def _tell_apart(models: Sequence[Model]) -> None:
    names = [model.name for model in models]
    for model, name in zip(models, names, strict=True):
        if names.count(name) > 1:
            model.name = f"{name} ({Path(model.path).name})"
    names = [model.name for model in models]
    for position, (model, name) in enumerate(zip(models, names, strict=True)):
        if names.count(name) > 1:
            model.name = f"{name} {names[: position + 1].count(name)}"
