"""The section of the replication: students beside each other and beside what the write-up found at 4.5B parameters."""

from itertools import groupby, pairwise

from cells import Part, grid
from distillkit.reporting import numbers
from distillkit.reporting.colours import series
from distillkit.reporting.document import Picture
from distillkit.reporting.plots import Axis, Mark, Series, line_chart
from frame import Json
from variants import base

TITLES = {
    "hybrid": "hybrid",
    "front_loaded": "front-loaded",
    "kda_only": "KDA only",
    "aligned": "hybrid, aligned first",
    "radlads": "hybrid, RADLADS",
    "hybrid_grouped": "hybrid, grouped heads",
    "hybrid_rope": "hybrid with RoPE",
    "best": "hybrid, closest recipe",
    "best_kda_only": "KDA only, closest recipe",
}
"""Names of variants in tables. `best` has the steps of recipes/smollm2/closest.yaml."""

SHORT_TITLES = {
    "aligned": "aligned",
    "radlads": "RADLADS",
    "hybrid_grouped": "grouped",
    "hybrid_rope": "with RoPE",
    "best": "closest",
}
SHORT_TITLES |= {"best_kda_only": "KDA"}
TRIALS = {"recall": "passages", "asked": "questions"}
"""Names of trials in tables, where they are not those of the file: what the text had besides."""
TASKS = {
    "niah_single_1": ("single", "Single needles in noise"),
    "niah_single_2": ("prose", "Single needles in prose"),
    "niah_multikey_1": ("multikey", "One of several keys"),
}
"""RULER's tasks: short and long names."""
NOISE, PROSE = "niah_single_1", "niah_single_2"
ALONE = ("kda_only", "best_kda_only")
"""Variants without full attention."""


def title(name: str, short: bool = False) -> str:
    """Of the teacher, a variant, or a trial of one (`best-a-b`)."""
    variant, *trial = name.split("-")
    if name == "teacher":
        return name
    trial = [TRIALS.get(each, each) for each in trial]
    first = SHORT_TITLES.get(variant, TITLES[variant]) if short else TITLES[variant]
    return ", ".join([first, *(trial[-1:] if short else trial)])


def finished(content: Json) -> dict[str, Json]:
    """The variants that did not fail."""
    return {name: variant for name, variant in content["variants"].items() if "phases" in variant}


def replication(content: Json) -> list[Part]:
    """Divergence, needles and claims; of a variant that failed, its error."""
    done = finished(content)
    parts: list[Part] = []
    if done:
        parts += [
            *divergence(done),
            "### Divergence by position",
            "KL by the position of the predicted token in its document, in rows of the longer length, before training "
            "on such rows:",
            positions(done, "short"),
            "After the phase of longer rows:",
            positions(done, "long"),
            *found_needles(done, content.get("teacher", {})),
            *beyond(done),
            "### Compared with the write-up",
            claims(done),
        ]
    failed = {name: variant["error"] for name, variant in content["variants"].items() if "error" in variant}
    return parts + [f"{title(name)}: {error}" for name, error in failed.items()]


def last_student(variant: Json) -> str:
    """The one of long rows, unless the variant ended before them."""
    return "long" if "long" in variant["trained_length"] else "short"


def measured(variant: Json, student: str, position: int = 0) -> Json:
    """The divergence of a variant's student (`short`, `long`), in rows of the first or second length."""
    found: Json = [*variant["divergence"].values()][position].get(student, {})
    return found


def kl(variant: Json, student: str, position: int = 0) -> float:
    value = measured(variant, student, position).get("kl")
    return float("nan") if value is None else float(value)


def trained_tokens(variant: Json, *, long: bool) -> int:
    """Tokens in the phase of long rows, or in those before it."""
    return sum(phase["tokens"] for phase in variant["phases"] if (phase["name"] == "long") is long)


def divergence(done: dict[str, Json]) -> list[Part]:
    short, long = (numbers.count(int(length)) for length in [*next(iter(done.values()))["divergence"]][:2])
    after_short, before_and_after = [], []
    for name, variant in done.items():
        end, tokens = measured(variant, "short"), trained_tokens(variant, long=True)
        after_short.append(
            [
                title(name),
                numbers.amount(trained_tokens(variant, long=False)),
                numbers.shown(variant["phases"][0]["divergence"].get("before", {}).get("kl"), numbers.decimals),
                f"{three(kl(variant, 'short'))} ± {numbers.shown(end.get('standard_errors', {}).get('kl'), three)}",
                numbers.shown(end.get("agreement"), numbers.percent),
                numbers.shown(end.get("student_perplexity"), numbers.decimals),
            ]
        )
        kls = (kl(variant, student, at) for at in (0, 1) for student in ("short", "long"))
        before_and_after.append(
            [
                title(name),
                numbers.amount(tokens) if tokens else numbers.NOTHING,
                *(numbers.shown(each, three) for each in kls),
            ]
        )
    teacher = next((measured(variant, "short").get("teacher_perplexity") for variant in done.values()), None)
    header = ["student", "tokens", "KL after conversion", "KL", "same likeliest token", "perplexity"]
    longer = ["student", f"tokens in rows of {long}"]
    longer += [f"KL at {at}, {when}" for at in (short, long) for when in ("before", "after")]
    return [
        "### Divergence from the teacher",
        f"After training on rows of {short} tokens, measured in such rows. KL is KL(teacher‖student) in nats per "
        f"token, ± one standard error. The teacher's perplexity is {numbers.shown(teacher, numbers.decimals)}.",
        grid(header, after_short),
        *curve(done),
        f"Before and after a last phase in rows of {long} tokens, measured in rows of {short} and of {long} tokens:",
        grid(longer, before_and_after),
    ]


def three(value: float) -> str:
    return f"{value:.3f}"


def whole_percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def curve(done: dict[str, Json]) -> list[Part]:
    """Held-out divergence over tokens while rows are short; long rows have another measure."""
    length = next(iter(done.values()))["phases"][0]["sequence_length"]
    lines = []
    for index, (name, variant) in enumerate(done.items()):
        tokens, points = 0, []
        for phase in variant["phases"]:
            if phase["sequence_length"] != variant["phases"][0]["sequence_length"]:
                break
            points += [(tokens + each["tokens"], each["kl"]) for each in phase["held_out"] if each["tokens"]]
            tokens += phase["tokens"]
        x, y = [float(x) for x, _ in points], [y for _, y in points]
        lines.append(Series(title(name, short=True), x, y, series(index)))
    if not any(line.x for line in lines):
        return []
    heading = f"Divergence from the teacher, rows of {numbers.length(length)} tokens"
    x_axis = Axis("tokens trained on", numbers.amount)
    y_axis = Axis("KL(teacher‖student), nats per token", numbers.decimals, log10=True)
    return [line_chart("replication-kl", heading, lines, x_axis, y_axis)]


POSITIONS = (0, 128, 1024, 2048, 4096, 8192)
"""Bounds of the ranges of positions that are shown; the files have finer ones."""


def positions(done: dict[str, Json], student: str) -> str:
    """Divergence by how many tokens were there to predict from, a column for each range of positions."""
    found = {name: at_end["positions"] for name, each in done.items() if (at_end := measured(each, student, 1))}
    ranges = [*pairwise(POSITIONS)]
    rows = [
        [title(name), *(numbers.shown(mean_kl(rows, *each), three) for each in ranges)] for name, rows in found.items()
    ]
    return grid(["student", *(f"{start:,}–{end:,}" for start, end in ranges)], rows)


def mean_kl(rows: list[Json], start: int, end: int) -> float | None:
    """Over the tokens of a range; nothing if it has none."""
    within = [row for row in rows if start <= row["from"] and row["to"] <= end]
    tokens = sum(row["tokens"] for row in within)
    return sum(row["kl"] * row["tokens"] for row in within) / tokens if tokens else None


def shares_of(rows: Json) -> dict[int, float]:
    """The share that was found, by length of the prompt."""
    return {int(length): rows[length]["correct"] / rows[length]["total"] for length in sorted(rows, key=int)}


def found_needles(done: dict[str, Json], teacher: Json) -> list[Part]:
    """Of each task a table and a picture after the phases of short rows, and a table after that of long ones."""
    parts: list[Part] = []
    for task, (short_name, kind) in TASKS.items():
        of_task: list[Part] = []
        for student in ("short", "long"):
            students = {name: each["needles"].get(student, {}) for name, each in done.items()}
            shares = {name: shares_of(needles[task]) for name, needles in students.items() if task in needles}
            if not shares:
                continue
            trained = next(done[name]["trained_length"][student] for name in shares)
            if task in teacher.get("needles", {}):
                shares = {"teacher": shares_of(teacher["needles"][task]), **shares}
            heading = f"{kind} found after training on {numbers.length(trained)}"
            of_task += [
                f"Found after training on rows of {numbers.length(trained)} tokens, by tokens of the prompt:",
                *needle_table(shares),
            ]
            if student == "short":
                of_task.append(needle_picture(f"replication-{short_name}", heading, shares, [*done], trained))
        if of_task:
            parts += [f"### {kind}", f"RULER's `{task}`.", *of_task, *by_depth(done, task)]
    return parts


def by_depth(done: dict[str, Json], task: str) -> list[Part]:
    """Where in the prompt the needles lay that the best retriever among the students of KDA alone found."""
    name = retriever(done)
    parts: list[Part] = []
    for student, tasks in done[name].get("needles_by_depth", {}).items() if name else ():
        if not (by_length := tasks.get(task)):
            continue
        depths = sorted({depth for found in by_length.values() for depth in found}, key=float)
        of = " or ".join(sorted({f"{total:g}" for found in by_length.values() for _, total in found.values()}))
        rows: list[tuple[str, list[str]]] = []
        for length, found in by_length.items():
            rows.append((length, [f"{found[each][0]:g}" if each in found else numbers.NOTHING for each in depths]))
        equal = [[*group] for _, group in groupby(rows, key=lambda row: row[1])]
        lengths = [[numbers.length(int(length)) for length, _ in group] for group in equal]
        names = [lengths[0] if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}" for lengths in lengths]
        trained = numbers.length(done[name]["trained_length"][student])
        parts += [
            f"{title(name)}, trained on rows of {trained}: how many of {of} needles it found, by the length of the "
            "prompt and the share of it that lies before the needle:",
            grid(
                ["prompt", *(whole_percent(float(each)) for each in depths)],
                [[first, *group[0][1]] for first, group in zip(names, equal, strict=True)],
            ),
        ]
    return parts


def retriever(done: dict[str, Json]) -> str:
    """The student of KDA alone that finds most needles in noise at the greatest length, of those measured by depth."""
    alone = [name for name in done if base(name) in ALONE and done[name].get("needles_by_depth")]
    return max(alone, key=lambda name: [*last_shares(done[name], NOISE).items()][-1:], default="")


def last_shares(variant: Json, task: str) -> dict[int, float]:
    """What the last student found, by length of the prompt."""
    return shares_of(variant["needles"].get(last_student(variant), {}).get(task, {}))


def needle_table(shares: dict[str, dict[int, float]]) -> list[Part]:
    """Shares by model and length of the prompt; the five greatest lengths, so that a table stays narrow."""
    lengths = sorted({length for found in shares.values() for length in found})[-5:]
    found = {name: each for name, each in shares.items() if any(each.values())}
    rows = [
        [title(name), *(numbers.shown(each.get(at), numbers.percent) for at in lengths)] for name, each in found.items()
    ]
    nothing = "; ".join(title(name) for name in shares if name not in found)
    table: list[Part] = [grid(["", *map(numbers.length, lengths)], rows)] if found else []
    return [*table, *([f"Nothing at any length: {nothing}."] if nothing else [])]


def needle_picture(
    name: str, heading: str, shares: dict[str, dict[int, float]], students: list[str], trained: int
) -> Picture:
    """`students`: all that any picture shows, so that each has one colour in all of them."""
    drawn = []
    for model, found in shares.items():
        colour = "teacher" if model == "teacher" else series(students.index(model))
        x = sorted(found)
        drawn.append(Series(title(model, short=True), [*map(float, x)], [found[each] for each in x], colour))
    ticks = sorted({float(length) for found in shares.values() for length in found})
    x_axis = Axis("tokens of the prompt", numbers.length, log2=True, ticks=ticks)
    y_axis = Axis("share found", whole_percent, limits=(-0.03, 1.05), ticks=[0, 0.25, 0.5, 0.75, 1])
    return line_chart(name, heading, drawn, x_axis, y_axis, [Mark(float(trained), "trained length")])


def beyond(done: dict[str, Json]) -> list[Part]:
    """Needles of the last students at their trained length and past it."""
    rows, nothing = [], []
    for name in (name for name in done if base(name) in ("hybrid", "best", *ALONE)):
        trained = done[name]["trained_length"][last_student(done[name])]
        for task, (_, kind) in TASKS.items():
            found = last_shares(done[name], task)
            at = [numbers.shown(found.get(times * trained), numbers.percent) for times in (1, 2, 4)]
            if any(share for length, share in found.items() if length >= trained):
                rows.append([title(name), kind.lower(), numbers.length(trained), *at])
            elif found:
                nothing.append(f"{title(name)} ({kind.lower()})")
    header = ["student", "task", "trained length", "found at it", "at twice", "at four times"]
    return [
        "### Past the trained length",
        "The write-up: the hybrid finds single needles at its trained length and fails past it; KDA alone finds single "
        "needles past it, and several keys less and less. Here, by students after their last phase:",
        *([grid(header, rows)] if rows else []),
        *([f"Nothing from the trained length on: {'; '.join(nothing)}."] if nothing else []),
    ]


def claims(done: dict[str, Json]) -> str:
    """What the write-up claims of AFM-4.5B, and what these files show of SmolLM2-135M."""
    name, student = closest(done)
    lowest, tokens = kl(done[name], student), tokens_until(done[name], student)
    found = f"{three(lowest)} after {numbers.amount(tokens)} tokens ({title(name)})"
    lines = [["KL of about 0.2 after some 300M tokens", yes(lowest < 0.25), found]]
    ends = {name: kl(variant, last_student(variant)) for name, variant in done.items()}
    layouts = [name for name in ("hybrid", "kda_only", "front_loaded") if name in ends]
    if len(layouts) == 3:
        order = sorted(layouts, key=ends.__getitem__)
        found = "KL " + " < ".join(f"{title(name)} {three(ends[name])}" for name in order)
        lines += [
            ["the hybrid is closer to the teacher than KDA alone", yes(ends["hybrid"] < ends["kda_only"]), found],
            ["front-loaded full attention is worst", yes(order[-1] == "front_loaded"), found],
        ]
    return grid(["AFM-4.5B, the write-up", "so here", "SmolLM2-135M, measured"], lines, words=True)


def yes(value: bool) -> str:
    return "yes" if value else "no"


def closest(done: dict[str, Json]) -> tuple[str, str]:
    """The variant, and its student, of the lowest divergence in short rows."""
    students = [(name, student) for name in done for student in ("short", "long") if measured(done[name], student)]
    return min(students, key=lambda each: kl(done[each[0]], each[1]))


def tokens_until(variant: Json, student: str) -> int:
    """That this student was trained on."""
    return trained_tokens(variant, long=False) + (trained_tokens(variant, long=True) if student == "long" else 0)
