"""The sections about divergence, benchmarks, and speed and memory: pictures, and the numbers in full."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from distillkit.reporting import numbers
from distillkit.reporting.comparison import benchmark_table, cache_and_state
from distillkit.reporting.document import Details, Gallery, Paragraph, Part, Picture, Section, Table, cells
from distillkit.reporting.models import Model
from distillkit.reporting.needles import trained_length_marks
from distillkit.reporting.numbers import Form
from distillkit.reporting.plots import Axis, Series, line_chart, wide
from distillkit.reporting.reading import Json, number, rows


def divergence_section(models: Sequence[Model]) -> Section | None:
    """Where in a text, and where in the network, students differ from their teacher."""
    students = [model for model in models if model.divergence]
    pictures = [*_positions(models, students), *_layers(students)]
    tables: list[Part] = []
    for model in students:
        if found := rows(model.divergence, "positions"):
            tables += [Paragraph(f"{model.name}, by position"), _position_table(found)]
    if not pictures:
        return None
    measured = {
        f"{model.name}: {numbers.shown(number(model.divergence, 'tokens'), numbers.count)}" for model in students
    }
    parts: list[Part] = [
        Paragraph(f"On held-out text; tokens measured: {', '.join(sorted(measured))}."),
        Gallery(pictures),
    ]
    return Section("Divergence", [*parts, Details("The numbers", tables)] if tables else parts)


def benchmark_section(models: Sequence[Model]) -> Section | None:
    """Every metric of every task."""
    table = benchmark_table(models)
    if table is None:
        return None
    return Section("Benchmarks", [Paragraph("As lm-evaluation-harness scores them."), table])


def speed_section(models: Sequence[Model]) -> Section | None:
    """Speed and memory against the length of the context."""
    measured = [model for model in models if model.speed]
    if not measured:
        return None

    def field(key: str) -> Callable[[Json], float | None]:
        return lambda row: number(row, key)

    wanted: list[tuple[str, Callable[[Json], float | None], Axis]] = [
        ("Decoding", field("decode_tokens_per_second"), Axis("tokens/s", numbers.amount, from_zero=True)),
        ("Prefill", field("prefill_tokens_per_second"), Axis("tokens/s", numbers.amount, from_zero=True)),
        ("Time to first token", field("time_to_first_token_seconds"), Axis("seconds", numbers.figures, from_zero=True)),
        ("KV cache and state", cache_and_state, Axis("memory beside the weights", numbers.bytes_, log2=True)),
        ("Peak memory", field("peak_bytes"), Axis("all memory", numbers.bytes_, log2=True)),
    ]
    pictures = [picture for title, of, y in wanted if (picture := _over_context(title, measured, of, y)) is not None]
    parts: list[Part] = [Gallery(pictures)] if pictures else []
    return Section("Speed and memory", [*parts, Details("The numbers", [_speed_table(measured)])])


def _positions(models: Sequence[Model], students: Sequence[Model]) -> list[Picture]:
    marks = trained_length_marks([model for model in models if not model.is_teacher])

    def chart(title: str, key: str, y: Axis, teachers_key: str | None = None) -> Picture | None:
        lines = [_over_positions(model, key, model.colour, model.name) for model in students]
        lines = [line for line in lines if len(line.x) > 1]
        if not lines:
            return None
        if teachers_key is not None:
            lines.insert(0, _over_positions(students[0], teachers_key, "teacher", "teacher"))
        ends = sorted({edge for model in students for edge in _edges(model)})
        ticks = [edge for edge in ends if edge > 0]
        x = Axis("position in the document, tokens", numbers.length, log2=True, ticks=ticks)
        inside = [mark for mark in marks if mark.x < ticks[-1]]
        y = replace(y, log10=True) if teachers_key is not None and wide(lines) else y
        return line_chart(numbers.slug(title), title, lines, x, y, inside)

    charts = [
        chart("KL by position", "kl", Axis("nats per token", numbers.figures, from_zero=True)),
        chart("Same likeliest token by position", "agreement", Axis("% of tokens", lambda share: f"{100 * share:.0f}")),
        chart(
            "Perplexity by position", "student_perplexity", Axis("perplexity", numbers.figures), "teacher_perplexity"
        ),
    ]
    return [each for each in charts if each is not None]


def _over_positions(model: Model, key: str, colour: str, label: str) -> Series:
    """One point per bucket, at its geometric middle, where a logarithmic axis has the middle."""
    points = [
        ((max(start, 1) * stop) ** 0.5, value)
        for row in rows(model.divergence, "positions")
        if (start := number(row, "from")) is not None
        and (stop := _end(row)) is not None
        and (value := number(row, key)) is not None
    ]
    return Series(label, [x for x, _ in points], [y for _, y in points], colour, dashed=colour == "teacher")


def _end(row: Json) -> float | None:
    """Where a bucket ends; the last one may be open, and is drawn to twice its beginning."""
    start, stop = number(row, "from"), number(row, "to")
    return stop if stop is not None or not start else 2 * start


def _edges(model: Model) -> list[float]:
    found = rows(model.divergence, "positions")
    return [edge for row in found for edge in (number(row, "from"), _end(row)) if edge is not None]


def _layers(students: Sequence[Model]) -> list[Picture]:
    lines = []
    for model in students:
        points = [
            (layer, cosine)
            for row in rows(model.divergence, "layers")
            if (layer := number(row, "layer")) is not None and (cosine := number(row, "cosine")) is not None
        ]
        if points:
            lines.append(Series(model.name, [x for x, _ in points], [y for _, y in points], model.colour))
    if not lines:
        return []
    x = Axis("layer", numbers.whole)
    return [line_chart("cosine-by-layer", "Likeness of hidden states", lines, x, Axis("cosine", numbers.figures))]


def _position_table(found: Sequence[Json]) -> Table:
    def value(row: Json, key: str, form: Form) -> str:
        return numbers.shown(number(row, key), form)

    body = [
        cells(
            f"{value(row, 'from', numbers.count)} to {value(row, 'to', numbers.count)}",
            value(row, "tokens", numbers.count),
            value(row, "kl", numbers.nats),
            value(row, "agreement", numbers.percent),
            value(row, "student_perplexity", numbers.decimals),
            value(row, "teacher_perplexity", numbers.decimals),
        )
        for row in found
    ]
    return Table(["position", "tokens", "KL", "agreement", "perplexity", "teacher's perplexity"], body)


def _over_context(title: str, models: Sequence[Model], of: Callable[[Json], float | None], y: Axis) -> Picture | None:
    lines = []
    for model in models:
        points = [
            (context, value)
            for row in model.speed
            if (context := number(row, "context")) is not None and (value := of(row)) is not None and value > 0
        ]
        if points:
            line = Series(model.name, [x for x, _ in points], [value for _, value in points], model.colour)
            lines.append(Series(line.label, line.x, line.y, line.colour, dashed=model.is_teacher))
    if not lines:
        return None
    contexts = sorted({x for line in lines for x in line.x})
    limits = (contexts[0] / 1.2, contexts[-1] * 1.2)
    x = Axis("tokens of context", numbers.length, log2=True, ticks=contexts, limits=limits)
    return line_chart(numbers.slug("speed", title), title, lines, x, y)


def _speed_table(models: Sequence[Model]) -> Table:
    columns: list[tuple[str, str, Form]] = [
        ("prefill, tokens/s", "prefill_tokens_per_second", numbers.rate),
        ("decoding, tokens/s", "decode_tokens_per_second", numbers.rate),
        ("first token", "time_to_first_token_seconds", numbers.seconds),
        ("weights", "weights_bytes", numbers.bytes_),
        ("KV cache", "kv_cache_bytes", numbers.bytes_),
        ("state", "state_bytes", numbers.bytes_),
        ("peak", "peak_bytes", numbers.bytes_),
    ]
    body = [
        cells(
            f"{model.name}, {numbers.shown(number(row, 'context'), numbers.length)}",
            *(numbers.shown(number(row, key), form) for _, key, form in columns),
        )
        for model in models
        for row in model.speed
    ]
    return Table(["model, tokens", *(label for label, _, _ in columns)], body)
