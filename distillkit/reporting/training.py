"""The section about runs: before and after, losses over tokens, phases, and what the students write."""

from collections.abc import Sequence
from typing import Any

from distillkit.reporting import numbers
from distillkit.reporting.colours import series
from distillkit.reporting.document import (
    Cell,
    Code,
    Details,
    Gallery,
    Heading,
    Paragraph,
    Part,
    Picture,
    Section,
    Table,
    Tone,
    cells,
)
from distillkit.reporting.numbers import Form
from distillkit.reporting.plots import Axis, Mark, Series, line_chart, wide
from distillkit.reporting.reading import Json, Phase, Run, number, rows, section

NOT_LOSSES = ("step", "epoch", "tokens", "tokens_per_second", "seconds", "grad_norm", "learning_rate")
OTHER_CURVES = {"learning_rate": "Learning rate", "grad_norm": "Norm of the gradient"}
UNITS = {
    "loss": "weighted mean of the losses",
    "agreement": "share of tokens",
    "student_perplexity": "perplexity",
    "hs_cosine": f"1 {numbers.MINUS} cosine",
    "attn_cosine": f"1 {numbers.MINUS} cosine",
    "learning_rate": "per step",
    "grad_norm": "before clipping",
    **dict.fromkeys(("kl", "reverse_kl", "jsd", "cross_entropy"), "nats per token"),
}
MOST_POINTS = 200

DIVERGENCE: list[tuple[str, str, Form]] = [
    ("kl", "KL(teacher‖student), nats per token", numbers.nats),
    ("agreement", "same likeliest token", numbers.percent),
    ("student_perplexity", "perplexity, student", numbers.decimals),
    ("teacher_perplexity", "perplexity, teacher", numbers.decimals),
]


def training_section(runs: Sequence[Run]) -> Section | None:
    """Losses of all runs in the same pictures, then each run by itself."""
    if not runs:
        return None
    names = run_names(runs)
    parts: list[Part] = []
    pictures = _loss_curves(runs, names)
    if pictures:
        parts += [_about_curves(runs), Gallery(pictures)]
    for run, name in zip(runs, names, strict=True):
        one: list[Part] = [Paragraph(_took(run))]
        if (table := divergence_table(run.results)) is not None:
            one.append(table)
        if (table := phase_table(run)) is not None:
            one.append(table)
        one += _samples(run)
        parts += [Heading(name), *one] if len(runs) > 1 else one
    return Section("Training", parts)


def run_names(runs: Sequence[Run]) -> list[str]:
    """A name for each run; those that share one are numbered."""
    names = [run.name for run in runs]
    return [
        f"{name} {names[: position + 1].count(name)}" if names.count(name) > 1 else name
        for position, name in enumerate(names)
    ]


def divergence_table(results: Json) -> Table | None:
    """Before and after training; None where neither was measured."""
    measured = section(results, "divergence")
    before, after = section(measured, "before"), section(measured, "after")
    if not before and not after:
        return None
    body = []
    for key, label, form in DIVERGENCE:
        first, last = number(before, key), number(after, key)
        if first is None and last is None:
            continue
        if key == "teacher_perplexity" or first is None or last is None:
            change = Cell("")
        else:
            good = last > first if key == "agreement" else last < first
            tone: Tone = "" if last == first else "better" if good else "worse"
            change = Cell(numbers.signed(last - first, form).removesuffix("%"), tone)
        body.append([Cell(label), Cell(numbers.shown(first, form)), Cell(numbers.shown(last, form)), change])
    tokens = [numbers.shown(number(each, "tokens"), numbers.count) for each in (before, after)]
    body.append(cells("tokens measured", *tokens, ""))
    return Table(["on held-out text", "before training", "after", "change"], body)


def phase_table(run: Run) -> Table | None:
    """What each phase learnt from and with; one row for a run without phases; None before the first step."""
    body = []
    for phase in run.phases:
        training = training_of(phase)
        tokens, seconds = number(training, "tokens"), number(training, "seconds")
        if tokens is None:
            continue
        measured = [number(phase.results, "divergence", when, "kl") for when in ("before", "after")]
        body.append(
            cells(
                phase.name or "training",
                numbers.count(tokens),
                numbers.shown(number(training, "step"), numbers.count),
                numbers.shown(seconds, numbers.seconds),
                numbers.shown(tokens / seconds if seconds else None, numbers.rate),
                numbers.shown(number(phase.config, "sequence_length"), numbers.count),
                numbers.shown(learning_rate(phase), numbers.figures),
                losses_of(phase),
                " → ".join(numbers.shown(each, numbers.nats) for each in measured if each is not None)
                or numbers.NOTHING,
            )
        )
    header = ["phase", "tokens", "steps", "time", "tokens/s", "row, tokens", "learning rate", "losses", "KL"]
    return Table(header, body) if body else None


def training_of(phase: Phase) -> Json:
    """Step, tokens and seconds: as the results say, or the last line of the metrics of a run that is under way."""
    found = section(phase.results, "training")
    if number(found, "tokens") is not None:
        return found
    if number(phase.results, "tokens") is not None:
        return {**phase.results, "step": phase.results.get("steps")}
    return next((line for line in reversed(phase.metrics) if number(line, "tokens") is not None), {})


def learning_rate(phase: Phase) -> float | None:
    """The highest: as configured, or as it was reached."""
    configured = number(phase.config, "training_args", "learning_rate")
    if configured is not None:
        return configured
    seen = [rate for line in phase.metrics if (rate := number(line, "learning_rate")) is not None]
    return max(seen, default=None)


def losses_of(phase: Phase) -> str:
    """`0.5 kl + 0.5 hs_cosine`, weights as configured."""
    told = [
        f"{numbers.figures(weight)} {loss.get('function')}" + (f" at T {temperature:g}" if temperature else "")
        for loss in rows(phase.config, "loss_functions")
        if (weight := number(loss, "weight"))
        for temperature in [number(loss, "temperature")]
    ]
    listed = phase.results.get("loss_functions")
    return " + ".join(told) or (", ".join(map(str, listed)) if isinstance(listed, list) else numbers.NOTHING)


def _took(run: Run) -> str:
    if not run.results:
        steps = [step for phase in run.phases if (step := number(training_of(phase), "step"))]
        return f"Not finished: {' + '.join(map(numbers.count, steps)) or 'no'} steps until now."
    training, parameters = section(run.results, "training"), section(run.results, "parameters")
    seconds, tokens = number(training, "seconds"), number(training, "tokens")
    told = [
        f"{numbers.shown(number(parameters, 'trained'), numbers.count)} parameters trained, "
        f"{numbers.shown(number(parameters, 'frozen'), numbers.count)} frozen"
    ]
    if not tokens:
        return f"{told[0]}; nothing was trained."
    told.append(f"{numbers.count(tokens)} tokens in {numbers.shown(seconds, numbers.seconds)}")
    if seconds:
        told.append(f"{numbers.rate(tokens / seconds)} tokens/s, teacher included")
    return f"{'; '.join(told)}."


def _about_curves(runs: Sequence[Run]) -> Paragraph:
    lines = max((len(phase.metrics) for run in runs for phase in run.phases), default=0)
    text = "Means per token since the line of the log before, over the tokens read."
    if any(len(run.phases) > 1 for run in runs):
        text += " Dashed lines: where a phase begins." if len(runs) == 1 else " Each phase is a stretch of its line."
    if lines > MOST_POINTS:
        text += f" A point is the mean of {-(-lines // MOST_POINTS)} lines."
    return Paragraph(text)


def _loss_curves(runs: Sequence[Run], names: Sequence[str]) -> list[Picture]:
    """A picture per loss. Phases follow one another along the tokens; a line has a gap where a phase lacks the loss."""
    found = [_curves(run) for run in runs]
    keys = list(dict.fromkeys(key for curves, _ in found for key in curves))
    pictures = []
    for key in sorted(keys, key=lambda key: (key in OTHER_CURVES, key.startswith("eval_"), keys.index(key))):
        drawn = []
        for index, (name, (curves, _)) in enumerate(zip(names, found, strict=True)):
            if key in curves and len(curves[key][0]) > 1:
                label = "" if len(runs) == 1 else name
                drawn.append(Series(label, *curves[key], series(index)))
        if drawn:
            marks = found[0][1] if len(runs) == 1 and len(found[0][1]) > 1 else []
            title = OTHER_CURVES.get(key, f"Held-out {key[5:]}" if key.startswith("eval_") else f"Loss: {key}")
            title = "Loss" if key == "loss" else title
            y = Axis(_unit(key), numbers.figures, log10="perplexity" in key and wide(drawn))
            name = numbers.slug("curve", key)
            pictures.append(line_chart(name, title, drawn, Axis("tokens"), y, marks, spans=True))
    return pictures


def _unit(key: str) -> str:
    name = key.removeprefix("eval_")
    return UNITS.get(name, "per token")


def _curves(run: Run) -> tuple[dict[str, tuple[list[float], list[float]]], list[Mark]]:
    """Name of what was logged → tokens and values; and where each phase begins."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    marks = []
    offset = 0.0
    for phase in run.phases:
        marks.append(Mark(offset, phase.name or "training"))
        last = offset
        points: dict[str, list[tuple[float, float]]] = {}
        for line in phase.metrics:
            if (tokens := number(line, "tokens")) is not None:
                last = offset + tokens
            for key, value in line.items():
                if _is_curve(key, value):
                    points.setdefault(key, []).append((last, float(value)))
        for key, found in points.items():
            xs, ys = curves.setdefault(key, ([], []))
            thin = _thinned(found)
            if xs:  # the phases' losses are different sums: no line joins them
                xs.append(offset)
                ys.append(float("nan"))
            xs += [x for x, _ in thin]
            ys += [y for _, y in thin]
        offset = last
    return curves, marks


def _is_curve(key: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if key.startswith("eval_"):
        return key in ("eval_kl", "eval_agreement", "eval_student_perplexity")
    return key not in NOT_LOSSES or key in OTHER_CURVES


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS, each the mean of as many."""
    size = -(-len(points) // MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _samples(run: Run) -> list[Part]:
    written = [
        Code(f"{each.get('prompt', '')}▸{each.get('continuation', '')}") for each in rows(run.results, "samples")
    ]
    return [Details("What the student writes (after ▸)", list(written))] if written else []
