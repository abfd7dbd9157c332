"""The first table of a report: the teacher beside its students, each difference, and whether it is an improvement.

A difference counts only where it is more than the error of measurement, wherever that is known: 1.96 standard errors of
the difference: of benchmarks with a record of each item those of the items' differences, else as if the two had been
measured on different items, which is never too small.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

from distillkit.reporting import numbers
from distillkit.reporting.document import Cell, Row, Table, Tone
from distillkit.reporting.evaluated import Z_95, Model, common_tasks, lengths, score, the_teacher
from distillkit.reporting.numbers import NOTHING, Form
from distillkit.reporting.reading import Json, number, rows, section, shown
from distillkit.reporting.shares import (
    MAIN_METRICS,
    Measured,
    comparable_tasks,
    main_metric,
    metric_name,
    pairable_tasks,
    paired,
    paired_over,
    share_of_teacher,
)
from distillkit.student.mixers.names import FULL, mixers_in, name_of

Better = Literal["higher", "lower"] | None
Change = Literal["none", "difference", "multiple"]

LEGEND = (
    f"In brackets: the difference from the teacher; {numbers.TIMES} is a multiple of it. ± is one standard error; "
    "≈ marks a difference within 1.96 standard errors, so that it may be chance."
)
ECE = "calibration error (ECE)"
KL, AGREEMENT = "KL(teacher‖student), nats per token", "same likeliest token"
STORED_KL = "KL over stored tokens (≤ KL(teacher‖student)), nats per token"
"""A captured teacher's other tokens count as one."""
DISTANCES: list[tuple[str, str, Form, float]] = [
    ("kl", KL, numbers.nats, 0),
    ("reverse_kl", "KL(student‖teacher), nats per token", numbers.nats, 0),
    ("jsd", "Jensen-Shannon divergence, nats per token", numbers.nats, 0),
    ("agreement", AGREEMENT, numbers.percent, 1),
    ("agreement_top5", "teacher's likeliest token among the student's five", numbers.percent, 1),
]
"""Key, label, form, and the teacher's distance from itself, which is known without measuring."""
SPEED: list[tuple[str, str, Form, Better]] = [
    ("prefill_tokens_per_second", "prefill{}, tokens/s", numbers.rate, "higher"),
    ("decode_tokens_per_second", "decoding{}, tokens/s", numbers.rate, "higher"),
    ("time_to_first_token_seconds", "first token{}", numbers.seconds, "lower"),
    ("cache_and_state_bytes", "KV cache and state{}", numbers.bytes_, "lower"),
    ("weights_bytes", "weights", numbers.bytes_, "lower"),
]
GENERATION: list[tuple[tuple[str, ...], str, str, Form, Better]] = [
    (("choices",), "letter_accuracy", "right by the likeliest letter", numbers.percent, "higher"),
    (("choices",), "generated_accuracy", "right letter written", numbers.percent, "higher"),
    (("choices",), "cloze_accuracy", "right by the likeliest text (cloze)", numbers.percent, "higher"),
    (("choices",), "same_answer", "same answer in another order of options", numbers.percent, "higher"),
    (("choices",), "unparsed", "written answers that are no letter", numbers.percent, "lower"),
    (("continuations",), "agreement", "greedy tokens equal to the teacher's", numbers.percent, None),
    (("continuations",), "first_difference", "greedy tokens before the first difference", numbers.figures, None),
    (("continuations",), "log_probability", "teacher's log-probability of a sampled token, nats", numbers.nats, None),
    (("continuations",), "log_probability_difference", "the same, less that of its own", numbers.nats, None),
    *(
        (("continuations", kind), key, f"{kind}: {label}", form, None)
        for kind in ("greedy", "sampled")
        for key, label, form in (
            ("repeated_4grams", "repeated 4-grams", numbers.percent),
            ("loops", "continuations that end in a loop", numbers.percent),
            ("ended", "continuations with an end", numbers.percent),
            ("tokens_at_end", "tokens of those", numbers.figures),
        )
    ),
]
"""Where in the results, key, label, form, and which direction is good."""


def comparison(models: Sequence[Model]) -> Table | None:
    """Everything that was measured of the models; None where nothing was."""
    groups = [
        ("share of the teacher's scores above chance", _shares(models)),
        ("answers beside the teacher's, item by item", _pairs(models)),
        ("divergence from the teacher", _divergence(models)),
        ("generation", _generation(models)),
        ("benchmarks", _benchmarks(models)),
        ("needles found", _needles(models)),
        ("long texts", _long_context(models)),
        ("speed and memory", _speed(models)),
    ]
    body: list[Row] = []
    for title, measured in groups:
        lines = list(measured)
        body += [[title], *lines] if lines else []
    if not body:
        return None
    unclear = [model.is_teacher and "teacher" not in model.name for model in models]
    names = [model.name + " (teacher)" * add for model, add in zip(models, unclear, strict=True)]
    about: list[Row] = []
    for key, label in (("parameters", "parameters"), ("trained_length", "trained length, tokens")):
        about += _row(models, label, [Measured(number(model.about, key)) for model in models], numbers.count)
    return Table(["", *names], [*about, ["layers", *map(_layers, models)], *body])


def benchmark_table(models: Sequence[Model]) -> Table | None:
    """Every task and metric, subtasks too."""
    body: list[Row] = []
    for task in dict.fromkeys(task for model in models for task in model.benchmarks):
        first = next(model.benchmarks[task] for model in models if task in model.benchmarks)
        items = shown(numbers.count, first, "samples")
        for metric in section(first, "metrics"):
            body += [[row[0], items, *row[1:]] for row in _metric(models, task, metric, f"{task}: {metric}")]
    return Table(["", "items", *(model.name for model in models)], body) if body else None


def _row(
    models: Sequence[Model],
    label: str,
    found: Sequence[Measured],
    form: Form,
    better: Better = None,
    change: Change = "none",
) -> list[Row]:
    """One row, or none where nothing was measured. `change`: how a student's difference from the teacher is shown."""
    if all(each.value is None for each in found):
        return []
    base = found[0] if the_teacher(models) is not None else None
    cells = []
    for model, each in zip(models, found, strict=True):
        reference = each.teacher or (None if model.is_teacher else base)
        cells.append(_cell(each, None if change == "none" else reference, form, better, change))
    return [[label, *cells]]


def _cell(found: Measured, teacher: Measured | None, form: Form, better: Better, change: Change) -> Cell:
    text, value = numbers.shown(found.value, form), found.value
    if value is not None and found.error:
        text += f" ± {form(found.error).removesuffix('%')}"
    if value is None or teacher is None or teacher.value is None or not math.isfinite(value - teacher.value):
        return Cell(text)
    if change == "multiple" and teacher.value <= 0:
        return Cell(text)
    difference = value - teacher.value
    multiple = numbers.ratio(value / teacher.value) if change == "multiple" else ""
    note = multiple or numbers.signed(difference, form).removesuffix("%")
    if better is None or difference == 0:
        return Cell(text, note=f"({note})")
    apart = math.hypot(found.error or 0, teacher.error or 0)
    if abs(difference) <= Z_95 * (apart if found.paired_error is None else found.paired_error):
        return Cell(text, note=f"({note} ≈)")
    tone: Tone = "better" if (difference > 0) == (better == "higher") else "worse"
    return Cell(text, tone, f"({note} {tone})")


def _layers(model: Model) -> str:
    """`23 KDA, 7 full attention` for a hybrid: what results say of the layers, where these differ."""
    layers = model.about.get("layers")
    if not isinstance(layers, list) or not layers:
        return NOTHING
    mixers = mixers_in({**model.about, "layer_types": layers}) or layers
    counts = Counter(name_of(mixer).label for mixer in sorted(mixers, key=lambda mixer: mixer == FULL))
    return ", ".join(f"{how_many} {label}" for label, how_many in counts.items())


def _divergence(models: Sequence[Model]) -> Iterator[Row]:
    """Distances from the teacher, and what is known of both; the teacher's own follows from its students' results."""
    students = [model.divergence for model in models if model.divergence]
    for key, label, form, of_itself in DISTANCES:
        measured = any(number(each, key) is not None for each in students)
        teacher = Measured(of_itself if measured else None)
        yield from _row(models, label, _beside(models, teacher, key), form)
    for name, label, form in (("perplexity", "perplexity", numbers.decimals), ("ece", ECE, numbers.percent)):
        known = [each for each in students if number(each, f"teacher_{name}") is not None]
        values = [each[f"teacher_{name}"] for each in known]
        same = bool(values) and math.isclose(min(values), max(values), rel_tol=1e-6)
        teacher = _with_error(known[0], f"teacher_{name}") if same else Measured()
        found = _beside(models, teacher, f"student_{name}", f"teacher_{name}")
        yield from _row(models, label, found, form, "lower", "difference")


def _beside(models: Sequence[Model], teacher: Measured, key: str, teachers_key: str = "") -> list[Measured]:
    """The value of each model under a key of its divergence; `teacher` for the teacher."""
    found = []
    for model in models:
        base = _with_error(model.divergence, teachers_key)
        own = _with_error(model.divergence, key, None if base.value is None else base)
        found.append(teacher if model.is_teacher and not model.divergence else own)
    return found


def _with_error(found: Json, key: str, teacher: Measured | None = None) -> Measured:
    return Measured(number(found, key), number(found, "standard_errors", key), teacher)


def _shares(models: Sequence[Model]) -> Iterator[Row]:
    """Over all tasks that all models have, and of each."""
    teacher, tasks = the_teacher(models), comparable_tasks(models)
    if teacher is None or not teacher.benchmarks or all(model.is_teacher for model in models):
        return
    for label, some in ((f"over {len(tasks)} tasks", tasks), *((task, [task]) for task in tasks)):
        if some and (label in tasks or len(tasks) > 1):
            found = [Measured(1) if model.is_teacher else share_of_teacher(model, teacher, some) for model in models]
            yield from _row(models, label, found, numbers.percent)


def _pairs(models: Sequence[Model]) -> Iterator[Row]:
    """How often students are at least as right as their teacher, more right, and less, over all tasks."""
    teacher = the_teacher(models)
    tasks = [] if teacher is None else pairable_tasks(models, teacher)
    if teacher is None or not tasks:
        return
    over = f"over {len(tasks)} tasks" if len(tasks) > 1 else tasks[0]
    pairs = [None if model.is_teacher else paired_over(model, teacher, tasks) for model in models]
    for label, key, error in (
        ("win or tie", "not_worse", "not_worse_error"),
        ("win", "win", None),
        ("loss", "loss", None),
        ("difference of the scores", "difference", "error"),
    ):
        found = [
            Measured()
            if pair is None
            else Measured(getattr(pair, key), None if error is None else getattr(pair, error))
            for pair in pairs
        ]
        yield from _row(models, f"{label}, {over}", found, numbers.percent)


def pair_table(models: Sequence[Model]) -> Table | None:
    """Each student beside its teacher on each whole task, item by item, for every metric with a record of each item."""
    teacher, body = the_teacher(models), list[Row]()
    for model in models if teacher is not None else []:
        for task in [] if model.is_teacher else model.whole_tasks:
            for metric in section(model.benchmarks, task, "metrics"):
                assert teacher is not None
                if (pair := paired(model, teacher, task, metric)) is not None:
                    share = metric_name(metric) in MAIN_METRICS
                    form = numbers.percent if share else numbers.figures
                    error = "" if pair.error is None else f" ± {form(pair.error).removesuffix('%')}"
                    shares = [numbers.percent(each) for each in (pair.win, pair.tie, pair.loss)]
                    difference = numbers.signed(pair.difference, form) + error
                    body.append([f"{model.name}, {task}: {metric}", numbers.count(pair.items), *shares, difference])
    return Table(["", "items", "win", "tie", "loss", "difference"], body) if body else None


def _generation(models: Sequence[Model]) -> Iterator[Row]:
    """Answers in a format, and continuations of prompts."""
    for where, key, label, form, better in GENERATION:
        found = [
            Measured(number(model.generation, *where, key), number(model.generation, *where, "standard_errors", key))
            for model in models
        ]
        yield from _row(models, label, found, form, better, "difference" if better else "none")


def _benchmarks(models: Sequence[Model]) -> Iterator[Row]:
    """The main metric of whole tasks, not of the subtasks of a group."""
    for task in dict.fromkeys(task for model in models for task in model.whole_tasks):
        first = next(model.benchmarks[task] for model in models if task in model.benchmarks)
        if (metric := main_metric(first)) is not None:
            noted = ", not the hub's" if any(section(model.benchmarks, task).get("note") for model in models) else ""
            yield from _metric(models, task, metric, f"{task} ({metric_name(metric)}{noted})")


def _metric(models: Sequence[Model], task: str, metric: str, label: str) -> list[Row]:
    results = [section(model.benchmarks, task) for model in models]
    metrics = [section(result, "metrics", metric) for result in results]
    errors = [_paired_error(model, models, task, metric) for model in models]
    found = [
        Measured(number(each, "value"), number(each, "standard_error"), paired_error=error)
        for each, error in zip(metrics, errors, strict=True)
    ]
    values = [abs(each.value) for each in found if each.value is not None]
    share = metric_name(metric) in (*MAIN_METRICS, "f1", "em") and max(values, default=2) <= 1
    form = numbers.percent if share else numbers.figures
    return _row(models, label, found, form, _direction(results, metric), "difference")


def _paired_error(model: Model, models: Sequence[Model], task: str, metric: str) -> float | None:
    """Of the difference of means over items; unknown where the metric is no such mean, as a perplexity is none."""
    teacher = the_teacher(models)
    if model.is_teacher or teacher is None or metric_name(metric) not in MAIN_METRICS:
        return None
    pair = paired(model, teacher, task, metric)
    return None if pair is None else pair.error


def _direction(results: Sequence[Json], metric: str) -> Better:
    """Which direction is good, as the task or its metric states."""
    for result in results:
        higher = result.get("higher_is_better")
        if isinstance(higher, dict):
            higher = higher.get(metric, higher.get(metric_name(metric)))
        if isinstance(higher, bool):
            return "higher" if higher else "lower"
    return None


def _needles(models: Sequence[Model]) -> Iterator[Row]:
    tasks = common_tasks(models)
    mean = f"mean of {len(tasks)} tasks" if len(tasks) > 1 else "".join(tasks)
    for length in lengths(models, tasks):
        found = [Measured(*(score(model, tasks, length) or ())) for model in models]
        label = f"at {numbers.length(length)} tokens, {mean}"
        yield from _row(models, label, found, numbers.percent, "higher", "difference")


def _long_context(models: Sequence[Model]) -> Iterator[Row]:
    """At the first and the last positions and distances that any model has."""
    positions = [rows(model.long_context, "documents", "positions") for model in models]
    edges = sorted({(row["from"], row["to"]) for found in positions for row in found})
    for start, end in dict.fromkeys([*edges[:1], *edges[-1:]]):
        at = [next((row for row in found if (row["from"], row["to"]) == (start, end)), {}) for found in positions]
        where = f"{numbers.length(start)} to {numbers.length(end)} tokens"
        yield from _row(
            models,
            f"perplexity, {where}",
            [_with_error(row, "perplexity") for row in at],
            numbers.decimals,
            "lower",
            "difference",
        )
        yield from _row(models, f"KL, {where}", [_with_error(row, "kl") for row in at], numbers.nats)
    words = [rows(model.long_context, "last_word") for model in models]
    distances = sorted({int(row["distance"]) for found in words for row in found})
    for distance in dict.fromkeys([*distances[:1], *distances[-1:]]):
        at = [next((row for row in found if row["distance"] == distance), {}) for found in words]
        for key, label, form in (
            ("accuracy", "last word right", numbers.percent),
            ("gain", "gain in nats", numbers.decimals),
        ):
            label = f"{label}, {numbers.length(distance)} tokens between"
            yield from _row(models, label, [_with_error(row, key) for row in at], form, "higher", "difference")


def _speed(models: Sequence[Model]) -> Iterator[Row]:
    """At the longest context at which all were measured."""
    measured = [{row["context"] for row in model.speed} for model in models if model.speed]
    context = max(set.intersection(*measured), default=0) if measured else 0
    if not context:
        return
    at = [next((row for row in model.speed if row["context"] == context), {}) for model in models]
    for key, label, form, better in SPEED:
        found = [Measured(number(row, key)) for row in at]
        yield from _row(models, label.format(f" at {numbers.length(context)} tokens"), found, form, better, "multiple")
