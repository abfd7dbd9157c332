"""The sections about each suite: pictures, and the numbers in full."""

import math
from collections.abc import Sequence
from dataclasses import replace

from distillkit.config.evaluate import OWN_TASK
from distillkit.reporting import numbers
from distillkit.reporting.comparison import benchmark_table, pair_table
from distillkit.reporting.document import Gallery, Part, Picture, Section, Table
from distillkit.reporting.evaluated import Model, common_tasks, lengths, needle_rows, score
from distillkit.reporting.numbers import Form
from distillkit.reporting.plots import Axis, Mark, Series, heat_map, line_chart, short, wide
from distillkit.reporting.reading import Json, number, rows, section, shown

POSITION_COLUMNS: list[tuple[str, str, Form]] = [
    ("tokens", "tokens", numbers.count),
    ("kl", "KL", numbers.nats),
    ("agreement", "agreement", numbers.percent),
    ("student_perplexity", "perplexity", numbers.decimals),
    ("teacher_perplexity", "teacher's perplexity", numbers.decimals),
]
LONG_COLUMNS: list[tuple[str, str, Form]] = [
    ("tokens", "tokens", numbers.count),
    ("perplexity", "perplexity", numbers.decimals),
    ("kl", "KL", numbers.nats),
    ("agreement", "agreement", numbers.percent),
]
LAST_WORD_COLUMNS: list[tuple[str, str, Form]] = [
    ("accuracy", "right", numbers.percent),
    ("accuracy_without", "right without", numbers.percent),
    ("log_probability", "log-probability, nats", numbers.decimals),
    ("log_probability_without", "without", numbers.decimals),
    ("gain", "gain", numbers.decimals),
    ("passages", "passages", numbers.count),
]
SPEED_COLUMNS: list[tuple[str, str, Form]] = [
    ("prefill_tokens_per_second", "prefill, tokens/s", numbers.rate),
    ("decode_tokens_per_second", "decoding, tokens/s", numbers.rate),
    ("time_to_first_token_seconds", "first token", numbers.seconds),
    ("weights_bytes", "weights", numbers.bytes_),
    ("kv_cache_bytes", "KV cache", numbers.bytes_),
    ("state_bytes", "state", numbers.bytes_),
    ("peak_bytes", "peak", numbers.bytes_),
]
SPEED_CHARTS = [
    ("decode_tokens_per_second", "Decoding", Axis("tokens/s", numbers.amount, from_zero=True)),
    ("prefill_tokens_per_second", "Prefill", Axis("tokens/s", numbers.amount, from_zero=True)),
    ("time_to_first_token_seconds", "Time to first token", Axis("seconds", numbers.figures, from_zero=True)),
    ("cache_and_state_bytes", "KV cache and state", Axis("memory beside the weights", numbers.bytes_, log2=True)),
    ("peak_bytes", "Peak memory", Axis("all memory", numbers.bytes_, log2=True)),
]


def divergence_section(models: Sequence[Model]) -> Section | None:
    """Where in a text, and where in the network, students differ from their teacher."""
    students = [model for model in models if model.divergence]
    pictures = [*_position_charts(models, students), *_layer_chart(students)]
    if not pictures:
        return None
    tables: list[Part] = []
    for model in students:
        if found := rows(model.divergence, "positions"):
            tables += [f"{model.name}, by position", _table("position", _bucket_labels(found), found, POSITION_COLUMNS)]
    measured = {f"{model.name}: {shown(numbers.count, model.divergence, 'tokens')}" for model in students}
    parts: list[Part] = [f"On held-out text; tokens measured: {', '.join(sorted(measured))}.", Gallery(pictures)]
    return Section("Divergence", [*parts, Section("The numbers", tables, folded=True)] if tables else parts)


def generation_section(models: Sequence[Model]) -> Section | None:
    """How long students write what their teacher writes."""
    body: list[list[str]] = []
    columns: list[str] = []
    for model in models:
        if by_length := rows(model.generation, "continuations", "by_length"):
            columns = max(columns, [shown(numbers.count, row, "tokens") for row in by_length], key=len)
            for key, label in (("agreement", "equal tokens"), ("identical", "all the same")):
                body.append([f"{model.name}, {label}", *(shown(numbers.percent, row, key) for row in by_length)])
    if not body:
        return None
    note = "Greedy continuations beside the teacher's: of their first so many tokens, those equal to the teacher's, "
    table = Table(["first tokens", *columns], [[*row, *[""] * (len(columns) + 1 - len(row))] for row in body])
    return Section("Generation", [note + "and the share of continuations in which all are.", table])


def benchmark_section(models: Sequence[Model]) -> Section | None:
    """Every metric of every task."""
    table = benchmark_table(models)
    if table is None:
        return None
    about = ["As lm-evaluation-harness scores them.", *benchmark_notes(models), *filter(None, map(_servers, models))]
    pairs = pair_table(models)
    parts: list[Part] = (
        []
        if pairs is None
        else [
            "Item by item: where a student scores more than its teacher (win), the same (tie) and less (loss).",
            pairs,
        ]
    )
    return Section("Benchmarks", [*about, table, *parts])


def benchmark_notes(models: Sequence[Model]) -> list[str]:
    """In which way the questions of a task are not those of the hub's dataset, and for which models."""
    found: dict[str, list[str]] = {}
    for model in models:
        for task in model.whole_tasks:
            if note := section(model.benchmarks, task).get("note"):
                found.setdefault(f"{task} is not the hub's: {note}", []).append(model.name)
    return [f"{note} ({', '.join(names)})." for note, names in found.items()]


def _servers(model: Model) -> str:
    """Which of the scores are of a server's answers; empty where none is."""
    found: dict[str, list[str]] = {}
    for task in model.benchmarks:
        if server := section(model.benchmarks[task], "server"):
            by = f" ({server['by']})" if server.get("by") else ""
            found.setdefault(f"{server.get('url')}{by}, as {server.get('model')}", []).append(task)
    return " ".join(f"{model.name} answered through {server}: {', '.join(tasks)}." for server, tasks in found.items())


def speed_section(models: Sequence[Model]) -> Section | None:
    """Speed and memory against the length of the context."""
    measured = [model for model in models if model.speed]
    if not measured:
        return None
    pictures = []
    for key, title, y in SPEED_CHARTS:
        lines = [
            _line(model, [row for row in model.speed if (number(row, key) or 0) > 0], "context", key)
            for model in measured
        ]
        lines = [line for line in lines if line.x]
        if contexts := sorted({x for line in lines for x in line.x}):
            limits = (contexts[0] / 1.2, contexts[-1] * 1.2)
            x = Axis("tokens of context", numbers.length, log2=True, ticks=contexts, limits=limits)
            pictures.append(line_chart(numbers.slug("speed", title), title, lines, x, y))
    found = [(model, row) for model in measured for row in model.speed]
    labels = [f"{model.name}, {shown(numbers.length, row, 'context')}" for model, row in found]
    table = _table("model, tokens", labels, [row for _, row in found], SPEED_COLUMNS)
    parts: list[Part] = [Gallery(pictures)] if pictures else []
    return Section("Speed and memory", [*parts, Section("The numbers", [table], folded=True)])


def needle_section(models: Sequence[Model]) -> Section | None:
    """Curves over length and heat maps: the mean of all tasks first, each task folded below."""
    measured = [model for model in models if model.needles]
    if not measured:
        return None
    tasks = common_tasks(measured)
    every_task = list(dict.fromkeys(task for model in measured for task in model.needles))
    total = sum(row["total"] for model in measured for row in needle_rows(model, every_task))
    parts: list[Part] = [
        "Needles are sentences hidden in a long text; a question at its end asks for them (RULER). A score is the "
        "share of the wanted values that the answer contains; "
        f"{total:,.0f} answers in all. The trained length is marked."
    ]
    if len(tasks) == 1:
        parts.append(_one_task(measured, tasks[0]))
    else:
        parts += [_needle_pictures(measured, tasks, f"mean of {len(tasks)} tasks")] if tasks else []
        parts.append(Section("Each task", [_one_task(measured, task) for task in every_task], folded=True))
    return Section("Needles", [*parts, Section("The numbers", [_needle_table(measured, every_task)], folded=True)])


def long_context_section(models: Sequence[Model]) -> Section | None:
    """Long documents by position, and last words of passages by distance."""
    read = [model for model in models if rows(model.long_context, "documents", "positions")]
    asked = [model for model in models if rows(model.long_context, "last_word")]
    parts: list[Part] = []
    tables: list[Part] = []
    if read:
        documents = {
            f"{model.name}: {shown(numbers.count, model.long_context, 'documents', 'documents')}" for model in read
        }
        parts += [
            "Long documents, each read from its beginning; the same documents are in every bucket of positions. "
            f"Documents: {', '.join(sorted(documents))}.",
            Gallery(_long_document_charts(read)),
        ]
        for model in read:
            found = rows(model.long_context, "documents", "positions")
            tables += [f"{model.name}, by position", _table("position", _bucket_labels(found), found, LONG_COLUMNS)]
    if asked:
        parts += [
            "The last word of passages, whose beginning stands so many tokens of other text before their last "
            "sentence. Without the beginning, only what needs no memory is known; the "
            "gain is the log-probability that the beginning adds.",
            Gallery(_last_word_charts(asked)),
        ]
        answered = [(model, row) for model in asked for row in rows(model.long_context, "last_word")]
        labels = [f"{model.name}, {shown(numbers.length, row, 'distance')} tokens between" for model, row in answered]
        tables += [_table("last words", labels, [row for _, row in answered], LAST_WORD_COLUMNS)]
    if not parts:
        return None
    return Section("Long texts", [*parts, Section("The numbers", tables, folded=True)])


def _long_document_charts(models: Sequence[Model]) -> list[Picture]:
    charts = []
    positions = [_positions(rows(model.long_context, "documents", "positions")) for model in models]
    for key, title, y in (
        ("perplexity", "Long documents: perplexity by position", Axis("perplexity", numbers.figures)),
        ("kl", "Long documents: KL by position", Axis("nats per token", numbers.figures, from_zero=True)),
    ):
        lines = [_line(model, found, "middle", key) for model, found in zip(models, positions, strict=True)]
        if lines := [line for line in lines if len(line.x) > 1]:
            y = replace(y, log10=key == "perplexity" and wide(lines))
            charts.append(_position_chart(title, lines, positions, y, _trained_length_marks(models)))
    return charts


def _last_word_charts(models: Sequence[Model]) -> list[Picture]:
    """Distances are places along the axis, since 0 has no logarithm."""
    distances = sorted({float(row["distance"]) for model in models for row in rows(model.long_context, "last_word")})
    if len(distances) < 2:
        return []
    charts = []
    share = Axis("% of passages", lambda value: f"{100 * value:.0f}", from_zero=True)
    gain = Axis("nats, with the beginning less without", numbers.figures, from_zero=True)
    places = [float(place) for place in range(len(distances))]
    x = Axis("tokens between", lambda place: numbers.length(distances[round(place)]), ticks=places)
    for key, title, y in (("accuracy", "Last word: right", share), ("gain", "Last word: gain", gain)):
        lines = []
        for model in models:
            found = [
                {**row, "place": distances.index(row["distance"])} for row in rows(model.long_context, "last_word")
            ]
            lines.append(_line(model, found, "place", key))
        charts.append(line_chart(numbers.slug(title), title, lines, x, y))
    return charts


def _trained_length_marks(models: Sequence[Model]) -> list[Mark]:
    """A vertical line for each trained length, and whose it is where they differ."""
    groups: dict[float, list[Model]] = {}
    for model in models:
        length = number(model.about, "trained_length")
        if length and math.isfinite(length):
            groups.setdefault(length, []).append(model)
    marks = []
    for length, group in sorted(groups.items()):
        who = "trained" if len(groups) == 1 else _together(group, models)
        colour = group[0].colour if len(group) == 1 and len(groups) > 1 else "muted"
        marks.append(Mark(length, f"{who} to {numbers.length(length)}", colour))
    return marks


def _together(group: Sequence[Model], models: Sequence[Model]) -> str:
    """A short name for some of the models."""
    if all(model.is_teacher for model in group):
        return "teacher"
    students = [model for model in models if not model.is_teacher]
    if len(students) > 1 and list(group) == students:
        return "students"
    return short(group[0].name, 12) + (f" +{len(group) - 1}" if len(group) > 1 else "")


def _one_task(models: Sequence[Model], task: str) -> Section:
    return Section(task, [_needle_pictures([model for model in models if task in model.needles], [task], task)])


def _needle_pictures(models: Sequence[Model], tasks: Sequence[str], title: str) -> Gallery:
    return Gallery([_needle_curve(models, tasks, title), *(_heat_map(model, tasks, title) for model in models)])


def _needle_curve(models: Sequence[Model], tasks: Sequence[str], title: str) -> Picture:
    lines = []
    for model in models:
        points = [(length, found[0]) for length in lengths([model], tasks) if (found := score(model, tasks, length))]
        lines.append(Series.through(points, model.name, model.colour, model.is_teacher))
    ticks = [float(length) for length in lengths(models, tasks)]
    x = Axis("tokens of context", numbers.length, log2=True, ticks=ticks, limits=(ticks[0] / 1.2, ticks[-1] * 1.2))
    y = Axis("% found", lambda value: f"{100 * value:.0f}", limits=(-0.03, 1.12), ticks=[0, 0.25, 0.5, 0.75, 1])
    return line_chart(numbers.slug("needles", title), f"Needles: {title}", lines, x, y, _trained_length_marks(models))


def _heat_map(model: Model, tasks: Sequence[str], title: str) -> Picture:
    columns = lengths([model], tasks)
    depths = sorted({float(row["depth"]) for row in needle_rows(model, tasks)})
    shares = [
        [found[0] if (found := score(model, tasks, length, depth)) else None for length in columns] for depth in depths
    ]
    trained = number(model.about, "trained_length")
    inside = 0 if trained is None else sum(length <= trained for length in columns)
    mark = (inside, f"trained to {numbers.length(trained)}") if trained and 0 < inside < len(columns) else None
    name = f"{numbers.slug('needles', title)}-of-{model.slug}"
    down = [f"{100 * depth:.0f} %" for depth in depths]
    return heat_map(name, f"{model.name}: {title}", [numbers.length(each) for each in columns], down, shares, mark)


def _needle_table(models: Sequence[Model], tasks: Sequence[str]) -> Table:
    columns = lengths(models, tasks)
    body = []
    for task in tasks:
        for model in (model for model in models if task in model.needles):
            found = [score(model, [task], length) for length in columns]
            shares = [numbers.shown(None if each is None else each[0], numbers.percent) for each in found]
            body.append([f"{task}, {model.name}", *shares])
            if mistaken := [_mistaken(model.needles[task], length) for length in columns if task == OWN_TASK]:
                body.append([f"{task}, {model.name}: another key's value", *mistaken])
    return Table(["tokens", *map(numbers.length, columns)], body)


def _mistaken(found: Sequence[Json], length: int) -> str:
    """The share of answers with the value of another key than the one asked for."""
    here = [row for row in found if row["length"] == length and number(row, "mistaken") is not None]
    total = sum(row["total"] for row in here)
    return numbers.shown(sum(row["mistaken"] for row in here) / total if total else None, numbers.percent)


def _position_charts(models: Sequence[Model], students: Sequence[Model]) -> list[Picture]:
    marks = _trained_length_marks([model for model in models if not model.is_teacher])
    positions = [_positions(rows(model.divergence, "positions")) for model in students]
    charts = []
    for key, title, y in (
        ("kl", "KL by position", Axis("nats per token", numbers.figures, from_zero=True)),
        ("agreement", "Same likeliest token by position", Axis("% of tokens", lambda share: f"{100 * share:.0f}")),
        ("student_perplexity", "Perplexity by position", Axis("perplexity", numbers.figures)),
    ):
        lines = [_line(model, found, "middle", key) for model, found in zip(students, positions, strict=True)]
        lines = [line for line in lines if len(line.x) > 1]
        if not lines:
            continue
        if key == "student_perplexity":
            teacher = _line(students[0], positions[0], "middle", "teacher_perplexity")
            lines.insert(0, replace(teacher, label="teacher", colour="teacher", dashed=True))
            y = replace(y, log10=wide(lines))
        charts.append(_position_chart(title, lines, positions, y, marks))
    return charts


def _position_chart(
    title: str, lines: Sequence[Series], positions: Sequence[Sequence[Json]], y: Axis, marks: Sequence[Mark]
) -> Picture:
    """positions: as of `_positions`, of each model."""
    ticks = sorted({edge for found in positions for row in found for edge in (row["from"], row["end"]) if edge > 0})
    x = Axis("position in the document, tokens", numbers.length, log2=True, ticks=ticks)
    inside = [mark for mark in marks if mark.x < ticks[-1]]
    return line_chart(numbers.slug(title), title, lines, x, y, inside)


def _positions(buckets: Sequence[Json]) -> list[Json]:
    """The buckets, each with its `end` and its geometric `middle`, the middle of a logarithmic axis.

    The last bucket may be open; it is drawn to twice its beginning.
    """
    found = []
    for row in buckets:
        start, end = number(row, "from"), number(row, "to")
        if start is not None and (end := end or 2 * start):
            found.append({**row, "end": end, "middle": (max(start, 1) * end) ** 0.5})
    return found


def _layer_chart(students: Sequence[Model]) -> list[Picture]:
    lines = [_line(model, rows(model.divergence, "layers"), "layer", "cosine") for model in students]
    lines = [line for line in lines if line.x]
    x, y = Axis("layer", numbers.whole), Axis("cosine", numbers.figures)
    return [line_chart("cosine-by-layer", "Similarity of hidden states", lines, x, y)] if lines else []


def _line(model: Model, found: Sequence[Json], x: str, y: str) -> Series:
    """A line through the rows that have both numbers."""
    points = [(a, b) for row in found if (a := number(row, x)) is not None and (b := number(row, y)) is not None]
    return Series.through(points, model.name, model.colour, model.is_teacher)


def _bucket_labels(buckets: Sequence[Json]) -> list[str]:
    return [f"{shown(numbers.count, row, 'from')} to {shown(numbers.count, row, 'to')}" for row in buckets]


def _table(first: str, labels: Sequence[str], found: Sequence[Json], columns: list[tuple[str, str, Form]]) -> Table:
    body = [
        [label, *(shown(form, row, key) for key, _, form in columns)] for label, row in zip(labels, found, strict=True)
    ]
    return Table([first, *(label for _, label, _ in columns)], body)
