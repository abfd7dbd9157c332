"""How much of its teacher's benchmark scores a student keeps: above chance, as a share of the teacher's above chance.

Of several tasks it is the ratio of the sums, so that a task at which the teacher itself hardly beats chance adds its
noise and no more. Errors are those of a ratio to first order, as if both models had answered different items, which is
rather too large.

Where results have a record of each item, student and teacher are compared item by item, also across two evaluations.
The error of their difference is then that of the mean of the items' differences (for right or wrong, McNemar's).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from distillkit.reporting.evaluated import Z_95, Model
from distillkit.reporting.reading import Json, number, section

MAIN_METRICS = ("acc_norm", "acc", "exact_match")
"""The metric that people quote of a task, in this order; else the first."""


@dataclass(frozen=True)
class Measured:
    """A value with its standard error, and the teacher's on the same tokens where it was measured with it.

    paired_error: of the difference from the teacher, where both answered the same items.
    """

    value: float | None = None
    error: float | None = None
    teacher: "Measured | None" = None
    paired_error: float | None = None


@dataclass(frozen=True)
class Paired:
    """Shares of items at which the student scores more than its teacher, the same and less, and their difference.

    difference: mean over items of student's less teacher's score. error, not_worse_error: standard errors of it and of
    `not_worse`, None for a single item.
    """

    items: int
    win: float
    tie: float
    loss: float
    difference: float
    error: float | None
    not_worse_error: float | None

    @property
    def not_worse(self) -> float:
        """Share of items that the student wins or ties."""
        return self.win + self.tie


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


def paired(model: Model, teacher: Model, task: str, metric: str) -> Paired | None:
    """A student beside its teacher, item by item; None where the items, or their prompts, are not the same.

    Of a metric that is better when lower, less is more. Items of lm-eval's `perplexity` are log-likelihoods.
    """
    ours, theirs = (section(each.benchmarks, task) for each in (model, teacher))
    if section(ours, "items").get("digest") != section(theirs, "items").get("digest"):
        return None
    values = [_item_values(each, metric) for each in (ours, theirs)]
    if len(values[0]) != len(values[1]) or not values[0]:
        return None
    higher = section(ours, "higher_is_better").get(metric)
    sign = -1 if higher is False and metric_name(metric) != "perplexity" else 1
    differences = [sign * (own - base) for own, base in zip(*values, strict=True)]
    items = len(differences)
    wins, losses = sum(each > 0 for each in differences), sum(each < 0 for each in differences)
    error, share_error = None, None
    if items > 1:
        error = statistics.stdev(differences) / math.sqrt(items)
        share_error = math.sqrt(losses * (items - losses) / (items - 1)) / items
    return Paired(
        items,
        wins / items,
        (items - wins - losses) / items,
        losses / items,
        sign * statistics.fmean(differences),
        error,
        share_error,
    )


def paired_over(model: Model, teacher: Model, tasks: Sequence[str]) -> Paired | None:
    """The means over tasks of their main metrics, each task counting the same; None where a task cannot be paired."""
    metrics = [(task, main_metric(section(teacher.benchmarks, task))) for task in tasks]
    found = [paired(model, teacher, task, metric) for task, metric in metrics if metric is not None]
    each = [one for one in found if one is not None]
    if not each or len(each) < len(tasks):
        return None
    errors = [one.error for one in each if one.error is not None]
    share_errors = [one.not_worse_error for one in each if one.not_worse_error is not None]
    return Paired(
        items=sum(one.items for one in each),
        win=statistics.fmean(one.win for one in each),
        tie=statistics.fmean(one.tie for one in each),
        loss=statistics.fmean(one.loss for one in each),
        difference=statistics.fmean(one.difference for one in each),
        error=math.hypot(*errors) / len(each) if len(errors) == len(each) else None,
        not_worse_error=math.hypot(*share_errors) / len(each) if len(share_errors) == len(each) else None,
    )


def pairable_tasks(models: Sequence[Model], teacher: Model) -> list[str]:
    """The tasks of `comparable_tasks` for which every student with benchmarks has the teacher's items."""
    students = [model for model in models if model.benchmarks and not model.is_teacher]
    return [
        task
        for task in comparable_tasks(models)
        if students and all(paired_over(student, teacher, [task]) is not None for student in students)
    ]


def _item_values(result: Json, metric: str) -> list[float]:
    """What each item scored; empty where that is unknown."""
    values = section(result, "items", "values").get(metric)
    if isinstance(values, str):
        return [float(digit) for digit in values] if {*values} <= {"0", "1"} else []
    if not isinstance(values, list) or not all(
        isinstance(each, int | float) and math.isfinite(each) for each in values
    ):
        return []
    return [float(each) for each in values]


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
