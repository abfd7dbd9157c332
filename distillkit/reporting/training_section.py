"""The section about runs: losses over tokens, divergence before and after, phases, and generated text."""

import math
from collections.abc import Sequence

from distillkit.reporting import numbers
from distillkit.reporting.colours import series
from distillkit.reporting.comparison import AGREEMENT, KL, STORED_KL
from distillkit.reporting.document import Cell, Code, Gallery, Part, Picture, Row, Section, Table
from distillkit.reporting.numbers import Form
from distillkit.reporting.plots import Axis, Mark, Series, line_chart, wide
from distillkit.reporting.reading import Json, Phase, Run, number, rows, section, shown
from distillkit.runs.clock import clock_text
from distillkit.runs.metrics import NOT_LOSSES

OTHER_CURVES = {"learning_rate": "Learning rate", "grad_norm": "Norm of the gradient"}
HELD_OUT_CURVES = ("eval_kl", "eval_agreement", "eval_student_perplexity")
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
    ("kl", KL, numbers.nats),
    ("agreement", AGREEMENT, numbers.percent),
    ("student_perplexity", "perplexity, student", numbers.decimals),
    ("teacher_perplexity", "perplexity, teacher", numbers.decimals),
]


def training_section(runs: Sequence[Run]) -> Section | None:
    """Losses of all runs in the same pictures, then each run by itself."""
    if not runs:
        return None
    pictures = _loss_curves(runs)
    parts: list[Part] = [_about_curves(runs), Gallery(pictures)] if pictures else []
    for run in runs:
        tables = [table for table in (divergence_table(run), phase_table(run)) if table is not None]
        generated = [
            Code(f"{each.get('prompt', '')}▸{each.get('continuation', '')}") for each in rows(run.results, "samples")
        ]
        clock = {part: each for part in section(run.results, "clock") if (each := number(run.results, "clock", part))}
        one: list[Part] = [_summary(run), *tables]
        one += [f"Time of the command that finished it: {clock_text(clock)}."] if "total" in clock else []
        one += [Section("Text that the student generates (after ▸)", generated, folded=True)] if generated else []
        parts += [Section(run.name, one)] if len(runs) > 1 else one
    return Section("Training", parts)


def over_stored_tokens(config: Json) -> bool:
    """Whether a run's teacher gave its likeliest tokens alone: KL is over these, and is less than of both models."""
    return section(config, "teacher").get("kind") in ("dataset", "server")


def measured_with(run: Run) -> Json:
    """The configuration that a run's divergence was measured with: that of its last phase."""
    return run.phases[-1].config if run.phases else run.config


def divergence_table(run: Run) -> Table | None:
    """Before and after training; None where neither was measured."""
    before, after = section(run.results, "divergence", "before"), section(run.results, "divergence", "after")
    if not before and not after:
        return None
    body: list[Row] = []
    for key, label, form in DIVERGENCE:
        if key == "kl" and over_stored_tokens(measured_with(run)):
            label = STORED_KL
        first, last = number(before, key), number(after, key)
        change = Cell("")
        if key != "teacher_perplexity" and first is not None and last is not None:
            good = last > first if key == "agreement" else last < first
            text = numbers.signed(last - first, form).removesuffix("%")
            change = Cell(text, "" if last == first else "better" if good else "worse")
        if first is not None or last is not None:
            body.append([label, numbers.shown(first, form), numbers.shown(last, form), change])
    tokens = [shown(numbers.count, each, "tokens") for each in (before, after)]
    return Table(["on held-out text", "before training", "after", "change"], [*body, ["tokens measured", *tokens, ""]])


def phase_table(run: Run) -> Table | None:
    """Data, settings and result of each phase; one row for a run without phases; None before the first step."""
    body = []
    for phase in run.phases:
        training = _training(phase)
        tokens, seconds = number(training, "tokens"), number(training, "seconds")
        if tokens is None:
            continue
        kl = [number(phase.results, "divergence", when, "kl") for when in ("before", "after")]
        body.append(
            [
                phase.name or "training",
                numbers.count(tokens),
                shown(numbers.count, training, "step"),
                numbers.shown(seconds, numbers.seconds),
                numbers.shown(tokens / seconds if seconds else None, numbers.rate),
                shown(numbers.count, phase.config, "sequence_length"),
                numbers.shown(_learning_rate(phase), numbers.figures),
                _losses(phase),
                (" → ".join(numbers.shown(each, numbers.nats) for each in kl if each is not None) or numbers.NOTHING)
                + " (stored tokens)" * (over_stored_tokens(phase.config) and any(each is not None for each in kl)),
            ]
        )
    header = ["phase", "tokens", "steps", "time", "tokens/s", "row, tokens", "learning rate", "losses", "KL"]
    return Table(header, body) if body else None


def _training(phase: Phase) -> Json:
    """Step, tokens and seconds: from the results, or from the last line of the metrics of an unfinished run."""
    summary = {**phase.results, "step": phase.results.get("steps")}
    found = [section(phase.results, "training"), summary, *reversed(phase.metrics)]
    return next((each for each in found if number(each, "tokens") is not None), {})


def _learning_rate(phase: Phase) -> float | None:
    """The highest: from the configuration, or from the metrics."""
    seen = [rate for line in phase.metrics if (rate := number(line, "learning_rate")) is not None]
    configured = number(phase.config, "training_args", "learning_rate")
    return max(seen, default=None) if configured is None else configured


def _losses(phase: Phase) -> str:
    """`0.5 kl + 0.5 hs_cosine`, with the configured weights."""
    terms = []
    for loss in rows(phase.config, "loss_functions"):
        if weight := number(loss, "weight"):
            temperature = number(loss, "temperature")
            at = f" at T {temperature:g}" if temperature else ""
            terms.append(f"{numbers.figures(weight)} {str(loss.get('function')).rpartition(':')[2]}{at}")
    listed = phase.results.get("loss_functions")
    return " + ".join(terms) or (", ".join(map(str, listed)) if isinstance(listed, list) else numbers.NOTHING)


def _summary(run: Run) -> str:
    if not run.results:
        steps = [step for phase in run.phases if (step := number(_training(phase), "step"))]
        return f"Not finished: {' + '.join(map(numbers.count, steps)) or 'no'} steps until now."
    seconds, tokens = (number(run.results, "training", key) for key in ("seconds", "tokens"))
    trained, frozen = (shown(numbers.count, run.results, "parameters", key) for key in ("trained", "frozen"))
    parts = [f"{trained} parameters trained, {frozen} frozen"]
    quantization = section(run.config, "teacher").get("quantization")
    parts += [f"linear layers of the teacher quantised to {quantization}"] if quantization else []
    in_float8 = any(phase.config.get("frozen_precision") for phase in run.phases)
    parts += ["frozen linear layers computed in float8"] if in_float8 else []
    if not tokens:
        return f"{'; '.join(parts)}; no training steps."
    parts.append(f"{numbers.count(tokens)} tokens in {numbers.shown(seconds, numbers.seconds)}")
    included = ", teacher included" if all(map(_runs_the_teacher, run.phases)) else ""
    parts += [f"{numbers.rate(tokens / seconds)} tokens/s{included}"] if seconds else []
    return f"{'; '.join(parts)}."


def _runs_the_teacher(phase: Phase) -> bool:
    """Whether each step needed the teacher's outputs, and a live or served teacher computed them."""
    losses = [loss.get("function") for loss in rows(phase.config, "loss_functions")]
    return section(phase.config, "teacher").get("kind") != "dataset" and any(loss != "cross_entropy" for loss in losses)


def _about_curves(runs: Sequence[Run]) -> str:
    text = "Each point is the mean per token since the previous log line, over the tokens trained on."
    if any(len(run.phases) > 1 for run in runs):
        text += " Dashed lines: where a phase begins." if len(runs) == 1 else " Lines have a gap between phases."
        text += _about_lengths(runs)
    lines = max((len(phase.metrics) for run in runs for phase in run.phases), default=0)
    return text + (f" A point is the mean of {-(-lines // MOST_POINTS)} log lines." if lines > MOST_POINTS else "")


def _about_lengths(runs: Sequence[Run]) -> str:
    """What the held-out numbers of phases with rows of several lengths are not."""
    lengths = [{number(phase.config, "sequence_length") for phase in run.phases} for run in runs]
    if max(map(len, lengths)) < 2:
        return ""
    return " Rows differ in length between phases, and with them what numbers mean: compare them within a phase."


def _loss_curves(runs: Sequence[Run]) -> list[Picture]:
    """A picture for each loss, with a line for each run. Learning rate and norm of the gradient come last."""
    curves = [_curves(run) for run in runs]
    marks = _phase_marks(runs[0]) if len(runs) == 1 and len(runs[0].phases) > 1 else []
    keys = list(dict.fromkeys(key for each in curves for key in each))
    pictures = []
    for key in sorted(keys, key=lambda key: (key in OTHER_CURVES, key.startswith("eval_"), keys.index(key))):
        drawn = [
            Series.through(each[key], "" if len(runs) == 1 else run.name, series(index))
            for index, (run, each) in enumerate(zip(runs, curves, strict=True))
            if len(each.get(key, [])) > 1
        ]
        if not drawn:
            continue
        title = "Loss" if key == "loss" else OTHER_CURVES.get(key, f"Loss: {key}")
        title = f"Held-out {key[5:]}" if key.startswith("eval_") else title
        unit = UNITS.get(key.removeprefix("eval_"), "per token")
        y = Axis(unit, numbers.figures, log10="perplexity" in key and wide(drawn))
        pictures.append(line_chart(numbers.slug("curve", key), title, drawn, Axis("tokens"), y, marks, spans=True))
    return pictures


def _curves(run: Run) -> dict[str, list[tuple[float, float]]]:
    """Logged name → points (tokens, value). Phases follow one another; a gap (NaN) in the line is between them."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for mark, phase in zip(_phase_marks(run), run.phases, strict=True):
        tokens = mark.x
        points: dict[str, list[tuple[float, float]]] = {}
        for line in phase.metrics:
            if (in_phase := number(line, "tokens")) is not None:
                tokens = mark.x + in_phase
            for key in filter(_is_curve, line):
                if (value := number(line, key)) is not None:
                    points.setdefault(key, []).append((tokens, value))
        for key, found in points.items():
            if key in curves:  # the phases' losses are different sums
                curves[key].append((mark.x, math.nan))
            curves.setdefault(key, []).extend(_thinned(found))
    return curves


def _phase_marks(run: Run) -> list[Mark]:
    """The tokens at which each phase begins."""
    marks, tokens = [], 0.0
    for phase in run.phases:
        marks.append(Mark(tokens, phase.name or "training"))
        tokens += next((each for line in reversed(phase.metrics) if (each := number(line, "tokens")) is not None), 0)
    return marks


def _is_curve(key: str) -> bool:
    if key.startswith("eval_"):
        return key in HELD_OUT_CURVES
    return key not in NOT_LOSSES or key in OTHER_CURVES


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS, each the mean of as many."""
    size = -(-len(points) // MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
