"""Needles: what was found at which length and depth, as numbers and pictures."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from distillkit.reporting import numbers
from distillkit.reporting.document import Details, Gallery, Heading, Paragraph, Part, Picture, Section, Table, cells
from distillkit.reporting.models import Model
from distillkit.reporting.plots import Axis, Mark, Series, heat_map, line_chart, short
from distillkit.reporting.reading import Json, number

SURE = 1.96
"""Standard errors that a difference of chance stays within in 95 of 100 cases."""


def common_tasks(models: Sequence[Model]) -> list[str]:
    """The tasks that every model with needles was given: only over those are means comparable."""
    measured = [model.needles for model in models if model.needles]
    return [task for task in measured[0] if all(task in each for each in measured)] if measured else []


def lengths(models: Sequence[Model], tasks: Sequence[str]) -> list[int]:
    """The lengths that were measured in any of the tasks, in tokens."""
    return sorted({int(row["length"]) for model in models for row in _rows(model, tasks)})


def score(model: Model, tasks: Sequence[str], length: int, depth: float | None = None) -> tuple[float, float] | None:
    """Mean score at a length (and depth) over samples of the tasks, and its standard error at most; None if unmeasured.

    A sample's score is a share, of which only sums are known. Of scores between 0 and 1 with mean p the variance is
    p (1 - p) at most. So that a mean of 0 or 1 is not beyond doubt, the error is that of Agresti and Coull (1998), as
    if there were 1.96² more samples, half of them right.
    """
    found = [row for row in _rows(model, tasks) if row["length"] == length and (depth is None or row["depth"] == depth)]
    total = sum(row["total"] for row in found)
    if not total:
        return None
    correct = sum(row["correct"] for row in found)
    samples = total + SURE**2
    share = (correct + SURE**2 / 2) / samples
    return correct / total, math.sqrt(max(share * (1 - share), 0) / samples)


def needle_section(models: Sequence[Model]) -> Section | None:
    """Curves over length and heat maps: the mean of all tasks first, each task folded below."""
    measured = [model for model in models if model.needles]
    if not measured:
        return None
    tasks = common_tasks(measured)
    every_task = list(dict.fromkeys(task for model in measured for task in model.needles))
    total = sum(row["total"] for model in measured for row in _rows(model, every_task))
    parts: list[Part] = [
        Paragraph(
            "Needles are sentences hidden in a long text, asked for at its end (RULER). A score is the share of the "
            f"wanted values that the answer contains; {total:,.0f} answers in all. The trained length is marked."
        )
    ]
    if len(tasks) != 1:
        mean = f"mean of {len(tasks)} tasks"
        if tasks:
            parts += [Gallery([_curve(measured, tasks, mean), *_heat_maps(measured, tasks, mean)])]
        each = [_one_task(measured, task) for task in every_task]
        parts.append(Details("Each task", [part for task in each for part in task]))
    else:
        parts += _one_task(measured, tasks[0])
    parts.append(Details("The numbers", [_table(measured, every_task)]))
    return Section("Needles", parts)


def trained_length_marks(models: Sequence[Model]) -> list[Mark]:
    """A vertical line for each trained length, and whose it is where they differ."""
    known = sorted(
        ((int(length), model) for model in models if (length := number(model.about, "trained_length"))),
        key=lambda each: each[0],
    )
    groups = [(length, [model for _, model in group]) for length, group in groupby(known, key=lambda each: each[0])]
    marks = []
    for length, group in groups:
        who = "trained" if len(groups) == 1 else _together(group, models)
        colour = group[0].colour if len(group) == 1 and len(groups) > 1 else "muted"
        marks.append(Mark(length, f"{who} to {numbers.length(length)}", colour))
    return marks


def _together(group: Sequence[Model], models: Sequence[Model]) -> str:
    """Some of the models in as few words as may be."""
    if all(model.is_teacher for model in group):
        return "teacher"
    students = [model for model in models if not model.is_teacher]
    if len(students) > 1 and list(group) == students:
        return "students"
    return short(group[0].name, 12) + (f" +{len(group) - 1}" if len(group) > 1 else "")


def _one_task(models: Sequence[Model], task: str) -> list[Part]:
    having = [model for model in models if task in model.needles]
    return [Heading(task), Gallery([_curve(having, [task], task), *_heat_maps(having, [task], task)])]


def _curve(models: Sequence[Model], tasks: Sequence[str], title: str) -> Picture:
    lines = []
    for model in models:
        points = [(length, found[0]) for length in lengths([model], tasks) if (found := score(model, tasks, length))]
        line = Series(model.name, [x for x, _ in points], [y for _, y in points], model.colour, model.is_teacher)
        lines.append(line)
    ticks = [float(length) for length in lengths(models, tasks)]
    x = Axis("tokens of context", numbers.length, log2=True, ticks=ticks, limits=(ticks[0] / 1.2, ticks[-1] * 1.2))
    y = Axis("% found", lambda value: f"{100 * value:.0f}", limits=(-0.03, 1.12), ticks=[0, 0.25, 0.5, 0.75, 1])
    return line_chart(numbers.slug("needles", title), f"Needles: {title}", lines, x, y, trained_length_marks(models))


def _heat_maps(models: Sequence[Model], tasks: Sequence[str], title: str) -> list[Picture]:
    pictures = []
    for model in models:
        columns = lengths([model], tasks)
        depths = sorted({float(row["depth"]) for row in _rows(model, tasks)})
        shares = [
            [found[0] if (found := score(model, tasks, length, depth)) else None for length in columns]
            for depth in depths
        ]
        trained = number(model.about, "trained_length")
        mark = None
        if trained is not None and 0 < (inside := sum(length <= trained for length in columns)) < len(columns):
            mark = (inside, f"trained to {numbers.length(trained)}")
        name = f"{numbers.slug('needles', title)}-of-{model.slug}"
        across = [numbers.length(length) for length in columns]
        down = [f"{100 * depth:.0f} %" for depth in depths]
        pictures.append(heat_map(name, f"{model.name}: {title}", across, down, shares, mark))
    return pictures


def _table(models: Sequence[Model], tasks: Sequence[str]) -> Table:
    columns = lengths(models, tasks)
    body = []
    for task in tasks:
        for model in models:
            if task in model.needles:
                found = [score(model, [task], length) for length in columns]
                told = [numbers.shown(None if each is None else each[0], numbers.percent) for each in found]
                body.append(cells(f"{task}, {model.name}", *told))
    return Table(["tokens", *map(numbers.length, columns)], body)


def _rows(model: Model, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the tasks that are whole."""
    needed = ("length", "depth", "correct", "total")
    return [row for task in tasks for row in model.needles.get(task, []) if _whole(row, needed)]


def _whole(row: Json, needed: Sequence[str]) -> bool:
    return all(number(row, key) is not None for key in needed)
