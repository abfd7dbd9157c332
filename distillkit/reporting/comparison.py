"""The table of a report: teacher beside students, each student's difference from the teacher and whether it is good.

A difference counts only where it is more than the error of measurement, wherever that is known: 1.96 standard errors of
the difference, as if the two had been measured on different items, which is never too sure of itself.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from distillkit.reporting import numbers
from distillkit.reporting.document import Cell, Table, Tone
from distillkit.reporting.models import Model, the_teacher
from distillkit.reporting.needles import SURE, common_tasks, lengths, score
from distillkit.reporting.numbers import NOTHING, Form
from distillkit.reporting.reading import Json, number, section

Better = Literal["higher", "lower"] | None

LEGEND = (
    f"In brackets: the difference from the teacher; {numbers.TIMES} is a multiple of it. ± is one standard error; "
    "≈ marks a difference within 1.96 standard errors, so that it may be chance."
)

AGREEMENT_TOP5 = "teacher's likeliest token among the student's five"
MAIN_METRICS = ("acc_norm", "acc", "exact_match")


@dataclass(frozen=True)
class Measured:
    """A number of a model, its standard error, and the teacher's of the same to hold it to, where they go together."""

    value: float | None = None
    error: float | None = None
    reference: float | None = None
    reference_error: float | None = None


@dataclass(frozen=True)
class Measure:
    """A row: what is measured, how it is written, which direction is good.

    relative: differences from the teacher are multiples. compared: the number is not a difference itself.
    """

    label: str
    of: Callable[[Model], Measured]
    form: Form = numbers.figures
    better: Better = None
    relative: bool = False
    compared: bool = True


def comparison(models: Sequence[Model]) -> Table | None:
    """All that was measured of the models; None where nothing was."""
    teacher = the_teacher(models)
    groups = [
        ("divergence from the teacher", list(_divergence(models))),
        ("benchmarks", list(_benchmarks(models))),
        ("needles found", list(_needles(models))),
        ("speed and memory", list(_speed(models))),
    ]
    body: list[list[Cell]] = []
    for title, measures in groups:
        lines = [line for measure in measures if (line := _row(measure, models, teacher)) is not None]
        body += [[Cell(title)], *lines] if lines else []
    if not body:
        return None
    header = ["", *(model.name if _tells_its_role(model) else f"{model.name} (teacher)" for model in models)]
    about = [line for line in (_row(measure, models, None) for measure in _about()) if line is not None]
    return Table(header, [*about, [Cell("layers"), *(Cell(layers_of(model)) for model in models)], *body])


def benchmark_table(models: Sequence[Model]) -> Table | None:
    """Every task and metric, subtasks too."""
    teacher = the_teacher(models)
    tasks = list(dict.fromkeys(task for model in models for task in model.benchmarks))
    body = []
    for task in tasks:
        about = next(model.benchmarks[task] for model in models if task in model.benchmarks)
        for metric in section(about, "metrics"):
            line = _row(_metric(models, task, metric, f"{task}: {metric}"), models, teacher)
            if line is not None:
                items = number(about, "samples")
                body.append([line[0], Cell(NOTHING if items is None else numbers.count(items)), *line[1:]])
    return Table(["", "items", *(model.name for model in models)], body) if body else None


def layers_of(model: Model) -> str:
    """`23 KDA, 7 full attention` for a hybrid."""
    kinds = model.about.get("layers")
    if not isinstance(kinds, list) or not kinds:
        return NOTHING
    linear = sum(kind == "linear_attention" for kind in kinds)
    parts = [(linear, "KDA"), (len(kinds) - linear, "full attention")]
    return ", ".join(f"{how_many} {kind}" for how_many, kind in parts if how_many)


def _tells_its_role(model: Model) -> bool:
    return not model.is_teacher or "teacher" in model.name


def main_metric(result: Json) -> str | None:
    """The metric that people quote of a task: acc_norm before acc before exact_match, else the first."""
    metrics = list(section(result, "metrics"))
    for wanted in MAIN_METRICS:
        for metric in metrics:
            if metric.split(",")[0] == wanted:
                return str(metric)
    return metrics[0] if metrics else None


def _row(measure: Measure, models: Sequence[Model], teacher: Model | None) -> list[Cell] | None:
    found = [measure.of(model) for model in models]
    if all(each.value is None for each in found):
        return None
    base = None if teacher is None else measure.of(teacher)
    return [
        Cell(measure.label),
        *(
            _cell(measure, each, None if model.is_teacher or teacher is None else base)
            for model, each in zip(models, found, strict=True)
        ),
    ]


def _cell(measure: Measure, found: Measured, teacher: Measured | None) -> Cell:
    text = numbers.shown(found.value, measure.form)
    if found.value is not None and found.error:
        text += f" ± {measure.form(found.error).removesuffix('%')}"
    base, of_base = found.reference, found.reference_error
    if base is None and teacher is not None:
        base, of_base = teacher.value, teacher.error
    if not measure.compared or found.value is None or base is None or not math.isfinite(found.value - base):
        return Cell(text)
    return _compared(measure, text, found.value, base, math.hypot(found.error or 0, of_base or 0))


def _compared(measure: Measure, text: str, value: float, base: float, error: float) -> Cell:
    difference = value - base
    if measure.relative:
        if base <= 0:
            return Cell(text)
        told = numbers.ratio(value / base)
    else:
        told = numbers.signed(difference, measure.form).removesuffix("%")
    if measure.better is None or difference == 0:
        return Cell(text, note=f"({told})")
    if abs(difference) <= SURE * error:
        return Cell(text, note=f"({told} ≈)")
    good = (difference > 0) == (measure.better == "higher")
    word: Tone = "better" if good else "worse"
    return Cell(text, word, f"({told}, {word})" if told.endswith("less") else f"({told} {word})")


def _about() -> Iterator[Measure]:
    yield Measure("parameters", lambda model: Measured(number(model.about, "parameters")), numbers.count)
    yield Measure(
        "trained length, tokens", lambda model: Measured(number(model.about, "trained_length")), numbers.count
    )


def _divergence(models: Sequence[Model]) -> Iterator[Measure]:
    students = [model.divergence for model in models if model.divergence]

    def error(content: Json, key: str) -> float | None:
        return number(content, "standard_errors", key)

    def apart(key: str, of_itself: float) -> Callable[[Model], Measured]:
        """How far from the teacher; its own distance from itself is known without measuring."""

        def of(model: Model) -> Measured:
            if model.is_teacher and not model.divergence:
                return Measured(of_itself) if any(number(each, key) is not None for each in students) else Measured()
            return Measured(number(model.divergence, key), error(model.divergence, key))

        return of

    def both(name: str) -> Callable[[Model], Measured]:
        """What is known of both models, on the same tokens; the teacher's column is empty where students had others."""

        def of(model: Model) -> Measured:
            teachers, students_own = f"teacher_{name}", f"student_{name}"
            if model.is_teacher and not model.divergence:
                found = [(value, each) for each in students if (value := number(each, teachers)) is not None]
                values = [value for value, _ in found]
                same = bool(found) and math.isclose(min(values), max(values), rel_tol=1e-6)
                return Measured(values[0], error(found[0][1], teachers)) if same else Measured()
            return Measured(
                number(model.divergence, students_own),
                error(model.divergence, students_own),
                number(model.divergence, teachers),
                error(model.divergence, teachers),
            )

        return of

    yield Measure("KL(teacher‖student), nats per token", apart("kl", 0), numbers.nats, compared=False)
    yield Measure("KL(student‖teacher), nats per token", apart("reverse_kl", 0), numbers.nats, compared=False)
    yield Measure("Jensen-Shannon divergence, nats per token", apart("jsd", 0), numbers.nats, compared=False)
    yield Measure("same likeliest token", apart("agreement", 1), numbers.percent, compared=False)
    yield Measure(AGREEMENT_TOP5, apart("agreement_top5", 1), numbers.percent, compared=False)
    yield Measure("perplexity", both("perplexity"), numbers.decimals, "lower")
    yield Measure("calibration error (ECE)", both("ece"), numbers.percent, "lower")


def _benchmarks(models: Sequence[Model]) -> Iterator[Measure]:
    """Whole tasks, not the subtasks of a group."""
    for task in dict.fromkeys(task for model in models for task in model.whole_tasks):
        about = next(model.benchmarks[task] for model in models if task in model.benchmarks)
        metric = main_metric(about)
        if metric is not None:
            yield _metric(models, task, metric, f"{task} ({metric.split(',')[0]})")


def _metric(models: Sequence[Model], task: str, metric: str, label: str) -> Measure:
    def of(model: Model) -> Measured:
        found = section(section(section(model.benchmarks, task), "metrics"), metric)
        return Measured(number(found, "value"), number(found, "standard_error"))

    better = _direction([model.benchmarks[task] for model in models if task in model.benchmarks], metric)
    values = [abs(found.value) for model in models if (found := of(model)).value is not None]
    share = metric.split(",")[0] in (*MAIN_METRICS, "f1", "em") and max(values, default=2) <= 1
    return Measure(label, of, numbers.percent if share else numbers.figures, better)


def _direction(results: Sequence[Json], metric: str) -> Better:
    """Which direction is good: said of the task, or of each of its metrics."""
    for result in results:
        told = result.get("higher_is_better")
        if isinstance(told, dict):
            told = told.get(metric, told.get(metric.split(",")[0]))
        if isinstance(told, bool):
            return "higher" if told else "lower"
    return None


def _needles(models: Sequence[Model]) -> Iterator[Measure]:
    tasks = common_tasks(models)
    for length in lengths(models, tasks):

        def of(model: Model, length: int = length) -> Measured:
            found = score(model, tasks, length)
            return Measured() if found is None else Measured(*found)

        label = f"at {numbers.length(length)} tokens"
        label += f", mean of {len(tasks)} tasks" if len(tasks) > 1 else f", {tasks[0]}"
        yield Measure(label, of, numbers.percent, "higher")


def _speed(models: Sequence[Model]) -> Iterator[Measure]:
    """At the longest context that all were measured at."""
    measured = [{row.get("context") for row in model.speed} for model in models if model.speed]
    common = [context for context in set.intersection(*measured) if context] if measured else []
    if not common:
        return
    context = max(common)
    at = f"at {numbers.length(context)} tokens"

    def row(model: Model) -> Json:
        return next((row for row in model.speed if row.get("context") == context), {})

    def field(key: str) -> Callable[[Model], Measured]:
        return lambda model: Measured(number(row(model), key))

    def memory(model: Model) -> Measured:
        return Measured(cache_and_state(row(model)))

    yield Measure(f"prefill {at}, tokens/s", field("prefill_tokens_per_second"), numbers.rate, "higher", True)
    yield Measure(f"decoding {at}, tokens/s", field("decode_tokens_per_second"), numbers.rate, "higher", True)
    yield Measure(f"first token {at}", field("time_to_first_token_seconds"), numbers.seconds, "lower", True)
    yield Measure(f"KV cache and state {at}", memory, numbers.bytes_, "lower", True)
    yield Measure("weights", field("weights_bytes"), numbers.bytes_, "lower", True)


def cache_and_state(row: Json) -> float | None:
    """Bytes of what a model keeps of a context, in a row of the speed suite."""
    parts = [number(row, key) for key in ("kv_cache_bytes", "state_bytes")]
    return None if all(part is None for part in parts) else sum(part or 0 for part in parts)
