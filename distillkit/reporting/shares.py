"""How much of its teacher's benchmark scores a student keeps: above chance, as a share of the teacher's above chance.

Of several tasks it is the ratio of the sums, so that a task at which the teacher itself hardly beats chance adds its
noise and no more. Errors are those of a ratio to first order, as if both models had answered different items, which is
rather too large.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from distillkit.reporting.evaluated import Z_95, Model
from distillkit.reporting.reading import Json, number, section

MAIN_METRICS = ("acc_norm", "acc", "exact_match")
"""The metric that people quote of a task, in this order; else the first."""


@dataclass(frozen=True)
class Measured:
    """A value with its standard error, and the teacher's on the same tokens where it was measured with it."""

    value: float | None = None
    error: float | None = None
    teacher: "Measured | None" = None


def main_metric(result: Json) -> str | None:
    """The metric of a task that stands for it; None where nothing was measured."""
    metrics = list(section(result, "metrics"))
    main = [metric for name in MAIN_METRICS for metric in metrics if metric_name(metric) == name]
    return next(iter([*main, *metrics]), None)


def metric_name(metric: str) -> str:
    """`acc` of `acc,none`: lm-evaluation-harness writes a filter behind the metric."""
    return metric.split(",")[0]


def comparable_tasks(models: Sequence[Model]) -> list[str]:
    """Whole tasks that all models with benchmarks have, with an accuracy and what guessing would give."""
    measured = [model for model in models if model.benchmarks]
    return [
        task
        for task in (measured[0].whole_tasks if measured else [])
        if all(task in model.whole_tasks and _above_chance(model, task) is not None for model in measured)
    ]


def share_of_teacher(model: Model, teacher: Model, tasks: Sequence[str]) -> Measured:
    """The share over the tasks; unknown where the teacher is not clearly (1.96 standard errors) better than chance."""
    ours = [_above_chance(model, task) for task in tasks]
    theirs = [_above_chance(teacher, task) for task in tasks]
    own, base = _sum(ours), _sum(theirs)
    if own.value is None or base.value is None or base.value <= Z_95 * (base.error or 0):
        return Measured()
    share = own.value / base.value
    if own.error is None or base.error is None:
        return Measured(share)
    return Measured(share, math.hypot(own.error, share * base.error) / base.value)


def _above_chance(model: Model, task: str) -> Measured | None:
    """None where the main metric is no accuracy, or chance is unknown, as in results of earlier versions."""
    result = section(model.benchmarks, task)
    metric, chance = main_metric(result), number(result, "chance")
    if metric is None or metric_name(metric) not in MAIN_METRICS or chance is None:
        return None
    value = number(result, "metrics", metric, "value")
    if value is None or not math.isfinite(value):
        return None
    return Measured(value - chance, number(result, "metrics", metric, "standard_error"))


def _sum(scores: Sequence[Measured | None]) -> Measured:
    values = [each.value for each in scores if each is not None and each.value is not None]
    errors = [each.error for each in scores if each is not None and each.error is not None]
    if not values or len(values) < len(scores):
        return Measured()
    return Measured(sum(values), math.hypot(*errors) if len(errors) == len(scores) else None)
