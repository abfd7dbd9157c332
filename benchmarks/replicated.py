"""The section of the replication: students beside each other and beside what the write-up found at 4.5B parameters."""

from itertools import pairwise

from tabled import Json, Part, grid
from variants import base

from distillkit.reporting import numbers
from distillkit.reporting.colours import series
from distillkit.reporting.document import Picture
from distillkit.reporting.plots import Axis, Mark, Series, line_chart

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
"""Names of variants as tables have them, in their order."""

SHORT_TITLES = {
    "radlads": "RADLADS",
    "hybrid_grouped": "grouped",
    "hybrid_rope": "with RoPE",
    "best": "best",
    "best_kda_only": "KDA",
}
TASKS = {
    "niah_single_1": ("single", "Single needles in noise"),
    "niah_single_2": ("prose", "Single needles in prose"),
    "niah_multikey_1": ("multikey", "Multikey needles"),
}
"""RULER's tasks: short and long names."""
ALONE = ("kda_only", "best_kda_only")
"""Variants without full attention."""


def title(name: str, short: bool = False) -> str:
    """Of a variant, or of a trial of one (`best-a-b`)."""
    variant, _, trial = name.partition("-")
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
        ]
        parts += found_needles(done, content.get("teacher"))
        parts += ["Beside the write-up:", claims(done)]
    parts += [f"{title(name)}: {variant['error']}" for name, variant in variants.items() if "error" in variant]
    return parts


def last_student(variant: Json) -> str:
    """The one of long rows, unless the variant ended before them."""
    return "long" if "long" in variant["trained_length"] else "short"


def measured(variant: Json, student: str, position: int = 0) -> Json:
    """The divergence of a variant's student (`short`, `long`), in rows of the first or second length."""
    lengths = list(variant["divergence"])
    found: Json = variant["divergence"][lengths[position]].get(student, {})
    return found


def kl(variant: Json, student: str, position: int = 0) -> float:
    value = measured(variant, student, position).get("kl")
    return float("nan") if value is None else float(value)


def divergence(done: dict[str, Json]) -> str:
    first = next(iter(done.values()))
    short, long = (numbers.count(int(length)) for length in list(first["divergence"])[:2])
    header = [
        "student",
        "tokens, short + long",
        "KL untrained",
        f"KL after short rows, at {short}",
        "same likeliest token",
        "perplexity",
        "teacher's",
        f"KL after short rows, at {long}",
        f"KL after long rows, at {short}",
        f"at {long}",
    ]
    lines = []
    for name, variant in done.items():
        tokens = [
            sum(each["tokens"] for each in variant["phases"] if (each["name"] == "long") is of) for of in (False, True)
        ]
        before = variant["phases"][0]["divergence"].get("before", {}).get("kl")
        end = measured(variant, "short")
        lines.append(
            [
                title(name),
                " + ".join(numbers.amount(each) for each in tokens if each),
                numbers.shown(before, numbers.decimals),
                numbers.shown(kl(variant, "short"), three),
                numbers.shown(end.get("agreement"), numbers.percent),
                numbers.shown(end.get("student_perplexity"), numbers.decimals),
                numbers.shown(end.get("teacher_perplexity"), numbers.decimals),
                numbers.shown(kl(variant, "short", 1), three),
                numbers.shown(kl(variant, "long"), three),
                numbers.shown(kl(variant, "long", 1), three),
            ]
        )
    return grid(header, lines)


def three(value: float) -> str:
    return f"{value:.3f}"


def whole_percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def curve(done: dict[str, Json]) -> list[Part]:
    """Held-out divergence over tokens while rows are short; long rows have another measure."""
    lines = []
    for index, (name, variant) in enumerate(done.items()):
        tokens, x, y = 0, [], []
        for phase in variant["phases"]:
            if phase["sequence_length"] != variant["phases"][0]["sequence_length"]:
                break
            for point in phase["held_out"]:
                if point["tokens"] or not x:
                    x.append(float(tokens + point["tokens"]))
                    y.append(point["kl"])
            tokens += phase["tokens"]
        lines.append(Series(title(name, short=True), x[1:], y[1:], series(index)))
    if not any(line.x for line in lines):
        return []
    length = numbers.length(next(iter(done.values()))["phases"][0]["sequence_length"])
    return [
        line_chart(
            "replication-kl",
            f"Divergence from the teacher, rows of {length} tokens",
            lines,
            Axis("tokens trained on", numbers.amount),
            Axis("KL(teacher‖student), nats per token", numbers.decimals, log10=True),
        )
    ]


def positions(done: dict[str, Json], student: str) -> str:
    """Divergence by how many tokens were there to predict from, a column for each variant."""
    found = {
        name: {(row["from"], row["to"]): row["kl"] for row in measured(variant, student, 1).get("positions", [])}
        for name, variant in done.items()
        if measured(variant, student, 1)
    }
    buckets = sorted({bucket for rows in found.values() for bucket in rows})
    lines = [
        [f"{start:,}–{end:,}", *(numbers.shown(rows.get((start, end)), three) for rows in found.values())]
        for start, end in buckets
    ]
    return grid(["position", *(title(name) for name in found)], lines)


def share(needles: Json, task: str, length: str) -> float | None:
    """Found of all that were asked for."""
    row = needles.get(task, {}).get(length)
    return row["correct"] / row["total"] if row else None


def found_needles(done: dict[str, Json], teacher: Json | None) -> list[Part]:
    """Of each task a table and a picture after the phases of short rows, and a table after that of long ones."""
    teachers = {"teacher": teacher["needles"]} if teacher and "needles" in teacher else {}
    parts: list[Part] = []
    for task, (short_name, kind) in TASKS.items():
        for student in ("short", "long"):
            named = {name: each["needles"].get(student, {}) for name, each in done.items()}
            models = {name: needles for name, needles in named.items() if task in needles}
            if not models:
                continue
            trained = next(done[name]["trained_length"][student] for name in models)
            models = {name: needles for name, needles in teachers.items() if task in needles} | models
            heading = f"{kind} found after training on {numbers.length(trained)}"
            parts += [f"{heading} ({task}), by tokens of the prompt:", needle_table(models, task)]
            if student == "short":
                parts.append(needle_picture(f"replication-{short_name}", heading, models, task, [*done], trained))
            parts += by_depth(done, task, student, heading)
    return parts


def by_depth(done: dict[str, Json], task: str, student: str, heading: str) -> list[Part]:
    """Where in the prompt the needles lay that KDA alone found."""
    measured_depths = {
        (name, length): found
        for name, variant in done.items()
        if base(name) in ALONE
        for length, found in variant.get("needles_by_depth", {}).get(student, {}).get(task, {}).items()
    }
    if not measured_depths:
        return []
    depths = sorted({depth for found in measured_depths.values() for depth in found}, key=float)
    rows = [
        [
            title(name),
            numbers.length(int(length)),
            *("{:g} of {}".format(*found[d]) if d in found else "–" for d in depths),
        ]
        for (name, length), found in measured_depths.items()
    ]
    header = ["student", "prompt", *(whole_percent(float(depth)) for depth in depths)]
    return [f"{heading}, by KDA alone, by the share of the prompt that lies before them:", grid(header, rows)]


def lengths_of(models: dict[str, Json], task: str) -> list[int]:
    return sorted({int(each) for needles in models.values() for each in needles.get(task, {})})


def needle_table(models: dict[str, Json], task: str) -> str:
    lengths = lengths_of(models, task)
    rows = [
        [shown_name(name), *(numbers.shown(share(needles, task, str(each)), numbers.percent) for each in lengths)]
        for name, needles in models.items()
    ]
    return grid(["", *map(numbers.length, lengths)], rows)


def needle_picture(
    name: str, heading: str, models: dict[str, Json], task: str, students: list[str], trained: int
) -> Picture:
    """`students`: all that any picture shows, so that each has one colour in all of them."""
    lengths = lengths_of(models, task)
    drawn = []
    for model, needles in models.items():
        points = [(float(each), share(needles, task, str(each))) for each in lengths]
        known = [(x, y) for x, y in points if y is not None]
        colour = "teacher" if model == "teacher" else series(students.index(model))
        drawn.append(Series(shown_name(model, short=True), [x for x, _ in known], [y for _, y in known], colour))
    return line_chart(
        name,
        heading,
        [line for line in drawn if line.x],
        Axis("tokens of the prompt", numbers.length, log2=True, ticks=[float(each) for each in lengths]),
        Axis("share found", whole_percent, limits=(-0.03, 1.05), ticks=[0, 0.25, 0.5, 0.75, 1]),
        [Mark(float(trained), "trained length")],
    )


def shown_name(model: str, short: bool = False) -> str:
    return model if model == "teacher" else title(model, short)


def claims(done: dict[str, Json]) -> str:
    """What the write-up says of AFM-4.5B, and what these files say of SmolLM2-135M."""
    ends = {name: kl(variant, last_student(variant)) for name, variant in done.items()}
    lines = [["KL of about 0.2 after some 300M tokens", _lowest(done)]]
    layouts = [name for name in ("hybrid", "kda_only", "front_loaded") if name in ends]
    if len(layouts) == 3:
        order = sorted(layouts, key=ends.__getitem__)
        told = " < ".join(f"{title(name)} {ends[name]:.3f}" for name in order)
        closer, worst = ends["hybrid"] < ends["kda_only"], order[-1] == "front_loaded"
        lines += [
            ["the hybrid recovers more than KDA alone", f"{'yes' if closer else 'no'}: KL {told}"],
            ["front-loaded full attention is worst", f"{'yes' if worst else 'no'}: KL {told}"],
        ]
    for alone in (name for name in done if base(name) == "best_kda_only"):
        hybrid = alone.replace("best_kda_only", "best")
        if hybrid in ends:
            told = f"KL {title(hybrid)} {ends[hybrid]:.3f}, {title(alone)} {ends[alone]:.3f}"
            lines.append(["(ours) the hybrid and KDA alone by the best recipe", told])
    for names, claim in (
        (("hybrid", "best"), "the hybrid finds single needles at its trained length, and crashes past it"),
        (
            ALONE,
            "KDA alone finds single needles past its trained length, and several keys smoothly less",
        ),
    ):
        told_of = [name for name in done if base(name) in names]
        lines += [[claim if name == told_of[0] else "", f"{title(name)}, {_past(done[name])}"] for name in told_of]
    for name, claim in (
        ("radlads", "(RADLADS) alignment first"),
        ("hybrid_grouped", "(ours) grouped heads"),
        ("hybrid_rope", "(ours) RoPE kept"),
    ):
        if name in done and "hybrid" in done:
            lines.append([claim, f"KL {ends[name]:.3f}, the one-phase hybrid {ends['hybrid']:.3f}"])
    return grid(["AFM-4.5B, the write-up", "SmolLM2-135M, measured"], lines, words=True)


def _lowest(done: dict[str, Json]) -> str:
    name, student = min(
        ((name, student) for name in done for student in ("short", "long")),
        key=lambda each: kl(done[each[0]], each[1]) if measured(done[each[0]], each[1]) else float("inf"),
    )
    phases = done[name]["phases"]
    tokens = sum(phase["tokens"] for phase in phases if student == "long" or phase["name"] != "long")
    return f"{kl(done[name], student):.3f} after {numbers.amount(tokens)} tokens ({title(name)})"


def _past(variant: Json) -> str:
    """Needles of the last student, of both kinds, from half its trained length to whatever was measured past it."""
    student = last_student(variant)
    needles, trained = variant["needles"].get(student, {}), variant["trained_length"][student]
    told = []
    for task, (_, kind) in TASKS.items():
        lengths = sorted(int(each) for each in needles.get(task, {}) if int(each) >= trained / 2)
        found = [(length, share(needles, task, str(length)) or 0.0) for length in lengths]
        kind = kind.lower()
        drops = [(a[1] - b[1], b[0]) for a, b in pairwise(found)]
        at = ", ".join(f"{numbers.percent(value)} at {numbers.length(length)}" for length, value in found)
        worst = max(drops, default=(0.0, 0))
        if not found:
            continue
        if all(value == 0 for _, value in found):
            told.append(f"{kind} none from {numbers.length(lengths[0])} on")
            continue
        told.append(f"{kind} {at}" + (f" (largest step down at {numbers.length(worst[1])})" if worst[0] > 0 else ""))
    return f"trained to {numbers.length(trained)}: " + "; ".join(told)
