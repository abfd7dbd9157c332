"""Several evaluations as one list of models, each with all that was measured of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distillkit.reporting.colours import series
from distillkit.reporting.reading import Evaluation, Json, rows, section


@dataclass
class Model:
    """A teacher or student. `about`: as the result file describes it; the rest empty where it was not measured."""

    name: str
    role: str
    path: str
    about: Json
    colour: str = "teacher"
    divergence: Json = field(default_factory=dict)
    benchmarks: dict[str, Json] = field(default_factory=dict)
    needles: dict[str, list[Json]] = field(default_factory=dict)
    speed: list[Json] = field(default_factory=list)

    @property
    def is_teacher(self) -> bool:
        return self.role == "teacher"


def merge_models(evaluations: Sequence[Evaluation]) -> list[Model]:
    """The teacher first, then students in the order in which they are met.

    A name with the same path is the same model: what a later file measured of it adds to the earlier, and replaces it
    where both measured the same. A name that stands for another path is told apart by that path.
    """
    models: dict[tuple[str, str], Model] = {}
    for evaluation in evaluations:
        content = evaluation.content
        for name, about in section(content, "models").items():
            path = str(about.get("path"))
            key = (name, path)
            if key not in models:
                models[key] = Model(name, str(about.get("role", "student")), path, about)
            _add(models[key], content, name)
    ordered = sorted(models.values(), key=lambda model: not model.is_teacher)
    for index, model in enumerate(model for model in ordered if not model.is_teacher):
        model.colour = series(index)
    _tell_apart(ordered)
    return ordered


def the_teacher(models: Sequence[Model]) -> Model | None:
    """The one model that the others are compared with; None where there is none, or several."""
    teachers = [model for model in models if model.is_teacher]
    return teachers[0] if len(teachers) == 1 else None


def _add(model: Model, content: Json, name: str) -> None:
    model.divergence.update(section(section(content, "divergence"), name))
    model.benchmarks.update(section(section(content, "benchmarks"), name))
    for task, found in section(section(content, "needles"), name).items():
        model.needles[task] = [row for row in found if isinstance(row, dict)]
    measured = rows(section(content, "speed"), name)
    contexts = {row.get("context") for row in measured}
    model.speed = sorted(
        [row for row in model.speed if row.get("context") not in contexts] + measured,
        key=lambda row: row.get("context") or 0,
    )


def _tell_apart(models: Sequence[Model]) -> None:
    names = [model.name for model in models]
    for model, name in zip(models, names, strict=True):
        if names.count(name) > 1:
            model.name = f"{name} ({Path(model.path).name})"
    names = [model.name for model in models]
    for position, (model, name) in enumerate(zip(models, names, strict=True)):
        if names.count(name) > 1:
            model.name = f"{name} {names[: position + 1].count(name)}"
