"""The section of the replication: students beside each other and beside what the write-up found at 4.5B parameters."""

from itertools import pairwise

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
    "radlads": "hybrid, RADLADS",
    "hybrid_grouped": "hybrid, grouped heads",
    "hybrid_rope": "hybrid with RoPE",
    "best": "hybrid, best recipe",
    "best_kda_only": "KDA only, best recipe",
}
"""Names of variants in tables."""

SHORT_TITLES = {"radlads": "RADLADS", "hybrid_grouped": "grouped", "hybrid_rope": "with RoPE", "best": "best"}
SHORT_TITLES |= {"best_kda_only": "KDA"}
TASKS = {
    "niah_single_1": ("single", "Single needles in noise"),
    "niah_single_2": ("prose", "Single needles in prose"),
    "niah_multikey_1": ("multikey", "Multikey needles"),
}
"""RULER's tasks: short and long names."""
ALONE = ("kda_only", "best_kda_only")
"""Variants without full attention."""


def title(name: str, short: bool = False) -> str:
    """Of the teacher, a variant, or a trial of one (`best-a-b`)."""
    variant, _, trial = name.partition("-")
    if name == "teacher":
        return name
    if short:
        return ", ".join(filter(None, [SHORT_TITLES.get(variant, TITLES[variant]), trial.rpartition("-")[2]]))
    return ", ".join(filter(None, [TITLES[variant], *trial.split("-")]))


def replication(content: Json) -> list[Part]:
    """Divergence, needles and claims; of a variant that failed, its error."""
    variants = content["variants"]
    done = {name: variant for name, variant in variants.items() if "phases" in variant}
    parts: list[Part] = []
    if done:
        parts += [
            divergence(done),
            *curve(done),
            "By position in the document, rows of the long phase's length, by students that have seen short rows only:",
            positions(done, "short"),
            "The same after the long phase:",
            positions(done, "long"),
            *found_needles(done, content.get("teacher", {})),
            "Beside the write-up:",
            claims(done),
        ]
    return parts + [f"{title(name)}: {variant['error']}" for name, variant in variants.items() if "error" in variant]


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


def divergence(done: dict[str, Json]) -> str:
    short, long = (numbers.count(int(length)) for length in [*next(iter(done.values()))["divergence"]][:2])
    header = ["student", "tokens, short + long", "KL untrained", f"KL after short rows, at {short}"]
    header += ["same likeliest token", "perplexity", "teacher's", f"KL after short rows, at {long}"]
    header += [f"KL after long rows, at {short}", f"at {long}"]
    lines = []
    for name, variant in done.items():
        phases, end = variant["phases"], measured(variant, "short")
        tokens = [sum(each["tokens"] for each in phases if (each["name"] == "long") is long) for long in (False, True)]
        lines.append(
            [
                title(name),
                " + ".join(numbers.amount(each) for each in tokens if each),
                numbers.shown(phases[0]["divergence"].get("before", {}).get("kl"), numbers.decimals),
                numbers.shown(kl(variant, "short"), three),
                numbers.shown(end.get("agreement"), numbers.percent),
                numbers.shown(end.get("student_perplexity"), numbers.decimals),
                numbers.shown(end.get("teacher_perplexity"), numbers.decimals),
                *(numbers.shown(kl(variant, *at), three) for at in (("short", 1), ("long", 0), ("long", 1))),
            ]
        )
    return grid(header, lines)


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


def positions(done: dict[str, Json], student: str) -> str:
    """Divergence by how many tokens were there to predict from, a column for each variant."""
    found = {
        name: {(row["from"], row["to"]): row["kl"] for row in at_end.get("positions", [])}
        for name, variant in done.items()
        if (at_end := measured(variant, student, 1))
    }
    lines = [
        [f"{start:,}–{end:,}", *(numbers.shown(rows.get((start, end)), three) for rows in found.values())]
        for start, end in sorted({bucket for rows in found.values() for bucket in rows})
    ]
    return grid(["position", *map(title, found)], lines)


def found_needles(done: dict[str, Json], teacher: Json) -> list[Part]:
    """Of each task a table and a picture after the phases of short rows, and a table after that of long ones."""
    parts: list[Part] = []
    for task, (short_name, kind) in TASKS.items():
        for student in ("short", "long"):
            students = {name: each["needles"].get(student, {}) for name, each in done.items()}
            models = {name: needles[task] for name, needles in students.items() if task in needles}
            if not models:
                continue
            trained = next(done[name]["trained_length"][student] for name in models)
            if task in teacher.get("needles", {}):
                models = {"teacher": teacher["needles"][task], **models}
            shares = {
                name: {int(length): row["correct"] / row["total"] for length, row in rows.items()}
                for name, rows in models.items()
            }
            heading = f"{kind} found after training on {numbers.length(trained)}"
            parts += [f"{heading} ({task}), by tokens of the prompt:", needle_table(shares)]
            if student == "short":
                parts.append(needle_picture(f"replication-{short_name}", heading, shares, [*done], trained))
            parts += by_depth(done, task, student, heading)
    return parts


def by_depth(done: dict[str, Json], task: str, student: str, heading: str) -> list[Part]:
    """Where in the prompt the needles lay that KDA alone found."""
    alone = {name: variant.get("needles_by_depth", {}) for name, variant in done.items() if base(name) in ALONE}
    rows = [
        (title(name), numbers.length(int(length)), found)
        for name, by_student in alone.items()
        for length, found in by_student.get(student, {}).get(task, {}).items()
    ]
    if not rows:
        return []
    depths = sorted({depth for *_, found in rows for depth in found}, key=float)
    header = ["student", "prompt", *(whole_percent(float(depth)) for depth in depths)]
    cells = [
        [name, length, *("{:g} of {}".format(*found[each]) if each in found else numbers.NOTHING for each in depths)]
        for name, length, found in rows
    ]
    return [f"{heading}, by KDA alone, by the share of the prompt that lies before them:", grid(header, cells)]


def needle_table(shares: dict[str, dict[int, float]]) -> str:
    """Shares by model and length of the prompt."""
    lengths = sorted({length for found in shares.values() for length in found})
    rows = [
        [title(name), *(numbers.shown(found.get(each), numbers.percent) for each in lengths)]
        for name, found in shares.items()
    ]
    return grid(["", *map(numbers.length, lengths)], rows)


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


def claims(done: dict[str, Json]) -> str:
    """What the write-up claims of AFM-4.5B, and what these files show of SmolLM2-135M."""
    ends = {name: kl(variant, last_student(variant)) for name, variant in done.items()}
    lines = [["KL of about 0.2 after some 300M tokens", _lowest(done)]]
    layouts = [name for name in ("hybrid", "kda_only", "front_loaded") if name in ends]
    if len(layouts) == 3:
        order = sorted(layouts, key=ends.__getitem__)
        found = "KL " + " < ".join(f"{title(name)} {ends[name]:.3f}" for name in order)
        closer, worst = ends["hybrid"] < ends["kda_only"], order[-1] == "front_loaded"
        lines += [
            ["the hybrid recovers more than KDA alone", f"{'yes' if closer else 'no'}: {found}"],
            ["front-loaded full attention is worst", f"{'yes' if worst else 'no'}: {found}"],
        ]
    for alone in (name for name in done if base(name) == "best_kda_only"):
        hybrid = alone.replace("best_kda_only", "best")
        if hybrid in ends:
            found = f"KL {title(hybrid)} {ends[hybrid]:.3f}, {title(alone)} {ends[alone]:.3f}"
            lines.append(["(ours) the hybrid and KDA alone by the best recipe", found])
    for names, claim in (
        (("hybrid", "best"), "the hybrid finds single needles at its trained length, and crashes past it"),
        (ALONE, "KDA alone finds single needles past its trained length, and several keys smoothly less"),
    ):
        named = [name for name in done if base(name) in names]
        lines += [[claim if name == named[0] else "", f"{title(name)}, {_past(done[name])}"] for name in named]
    for name, claim in (
        ("radlads", "(RADLADS) alignment first"),
        ("hybrid_grouped", "(ours) grouped heads"),
        ("hybrid_rope", "(ours) RoPE kept"),
    ):
        if name in done and "hybrid" in done:
            lines.append([claim, f"KL {ends[name]:.3f}, the one-phase hybrid {ends['hybrid']:.3f}"])
    return grid(["AFM-4.5B, the write-up", "SmolLM2-135M, measured"], lines, words=True)


def _lowest(done: dict[str, Json]) -> str:
    """The lowest divergence of any student in short rows."""
    students = [(name, student) for name in done for student in ("short", "long") if measured(done[name], student)]
    name, student = min(students, key=lambda each: kl(done[each[0]], each[1]))
    phases = done[name]["phases"]
    tokens = sum(phase["tokens"] for phase in phases if student == "long" or phase["name"] != "long")
    return f"{kl(done[name], student):.3f} after {numbers.amount(tokens)} tokens ({title(name)})"


def _past(variant: Json) -> str:
    """Needles of the last student, of each kind, from half its trained length to whatever was measured past it."""
    student = last_student(variant)
    trained = variant["trained_length"][student]
    kinds = []
    for task, (_, kind) in TASKS.items():
        rows = {int(length): row for length, row in variant["needles"].get(student, {}).get(task, {}).items()}
        found = [(each, rows[each]["correct"] / rows[each]["total"]) for each in sorted(rows) if each >= trained / 2]
        if not found:
            continue
        if all(value == 0 for _, value in found):
            kinds.append(f"{kind.lower()} none from {numbers.length(found[0][0])} on")
            continue
        at = ", ".join(f"{numbers.percent(value)} at {numbers.length(length)}" for length, value in found)
        drop, length = max(((a[1] - b[1], b[0]) for a, b in pairwise(found)), default=(0.0, 0))
        kinds.append(f"{kind.lower()} {at}" + (f" (largest step down at {numbers.length(length)})" if drop > 0 else ""))
    return f"trained to {numbers.length(trained)}: " + "; ".join(kinds)
