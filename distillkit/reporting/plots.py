"""Lines and heat maps as SVG, drawn by matplotlib in placeholder colours (`reporting.colours`).

Every picture is 400 units wide with text of 11 and 12, so that it can be read at its own size on a telephone; on a
wide page several stand side by side. Text stays text, in the reader's own font. Lines are labelled at their ends.
"""

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from distillkit.reporting.colours import DOTTED, HEAT_LEVELS, placeholder
from distillkit.reporting.document import HEIGHT, OPENING, WIDTH, Picture
from distillkit.reporting.numbers import NOTHING, Form, amount, whole

FONT, SMALL = 12, 11
CHARACTER, BOLD = 5.9, 7.6
"""Units that a character takes on average in the widest of usual fonts: of size SMALL, and in bold."""
LONGEST_LABEL = 14
LABEL = {"textcoords": "offset points", "fontsize": SMALL, "annotation_clip": False, "parse_math": False}
FAMILY = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"


@dataclass(frozen=True)
class Series:
    """A line. `colour`: a name of the palette."""

    label: str
    x: list[float]
    y: list[float]
    colour: str
    dashed: bool = False

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]], label: str, colour: str, dashed: bool = False) -> "Series":
        """The line through points (x, y)."""
        return cls(label, [x for x, _ in points], [y for _, y in points], colour, dashed)


@dataclass(frozen=True)
class Mark:
    """A vertical line at `x`, and what it says."""

    x: float
    label: str
    colour: str = "muted"


@dataclass(frozen=True)
class Axis:
    """What is along an axis, and how its numbers are written."""

    label: str
    form: Form = amount
    log2: bool = False
    log10: bool = False
    from_zero: bool = False
    limits: tuple[float, float] | None = None
    ticks: list[float] | None = None


def wide(series: Sequence[Series]) -> bool:
    """Whether most of the lines would lie flat on an axis that is not logarithmic."""
    values = [y for line in series for y in line.y if math.isfinite(y) and y > 0]
    return bool(values) and max(values) > 10 * min(values)


def short(name: str, limit: int = LONGEST_LABEL) -> str:
    """A name cut in its middle: its end often tells it from the others."""
    if len(name) <= limit:
        return name
    return f"{name[: (limit - 1) // 2]}…{name[-(limit // 2) :]}"


def line_chart(
    name: str, title: str, series: Sequence[Series], x: Axis, y: Axis, marks: Sequence[Mark] = (), spans: bool = False
) -> Picture:
    """Lines over `x`; the title says what they are, `y.label` their unit.

    spans: marks begin stretches, whose labels stand in them; else a label belongs to its line.
    """
    drawn = [_finite(line) for line in series]
    labels = [short(line.label) for line in drawn]
    alone = len(drawn) == 1 and not labels[0]
    figure, axes = _figure(title, y.label, right=14 if alone else 16 + BOLD * max(len(label) for label in labels))
    for line in drawn:
        dashes: Any = (0, (4, 2)) if line.dashed else (0, (1, 1.2)) if line.colour in DOTTED else "-"
        style = {"linewidth": 1.8, "markersize": 4, "solid_capstyle": "round", "color": placeholder(line.colour)}
        axes.plot(line.x, line.y, linestyle=dashes, marker="o" if len(line.x) <= 12 else None, **style)
    _scale(axes.xaxis, axes.set_xscale, axes.set_xlim, x, [value for line in drawn for value in line.x])
    values = [value for line in drawn for value in line.y if not math.isnan(value)]
    _scale(axes.yaxis, axes.set_yscale, axes.set_ylim, y, values)
    axes.set_xlabel(x.label, color=placeholder("muted"), fontsize=SMALL, labelpad=3)
    last = max((line.x[-1] for line in drawn if line.x), default=0)
    _draw_marks(axes, [mark for mark in marks if mark.x < last or not spans], spans)
    if not alone:
        _label_ends(axes, drawn, labels)
    ends = [f"{line.label or title}: {_ends(line, x, y)}" for line in drawn if line.x]
    return _picture(name, figure, f"{title} ({y.label}) over {x.label}. {'; '.join(ends)}")


def heat_map(
    name: str,
    title: str,
    columns: Sequence[str],
    rows: Sequence[str],
    shares: Sequence[Sequence[float | None]],
    mark: tuple[int, str] | None = None,
) -> Picture:
    """Shares between 0 and 1, as colour and as per cent; None stays empty.

    columns: lengths. rows: depths, the first at the top. mark: the number of columns inside the trained length, and its
    label.
    """
    from matplotlib.patches import Rectangle

    figure, axes = _figure(title, "% found, by depth and tokens of context", left=48, right=10, top=60 if mark else 48)
    for row, line in enumerate(shares):
        for column, share in enumerate(line):
            fill, edge, ink = "none", placeholder("grid"), "muted"
            if share is not None:
                level = round(min(max(share, 0), 1) * (HEAT_LEVELS - 1))
                fill, edge, ink = placeholder(f"heat{level}"), placeholder("surface"), f"on-heat{level}"
            axes.add_patch(Rectangle((column, row), 1, 1, facecolor=fill, edgecolor=edge, linewidth=1.5))
            if len(columns) <= 9:
                style = {"ha": "center", "va": "center", "color": placeholder(ink), "fontsize": SMALL}
                axes.text(column + 0.5, row + 0.5, _per_cent(share), **style)
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    axes.set_xticks([column + 0.5 for column in range(len(columns))], list(columns))
    axes.set_yticks([row + 0.5 for row in range(len(rows))], list(rows))
    axes.spines["bottom"].set_visible(False)
    axes.grid(visible=False)
    if mark is not None:
        at, label = mark
        axes.plot([at, at], [-0.25, len(rows)], color=placeholder("ink"), linewidth=1.4, clip_on=False)
        side = ("right", -4) if at > len(columns) / 2 else ("left", 4)
        place = {"ha": side[0], "va": "center", "xytext": (side[1], 0), "color": placeholder("muted")}
        axes.annotate(label, (at, -0.25), **place, **LABEL)
    found = [f"{row}: {', '.join(map(_per_cent, line))}" for row, line in zip(rows, shares, strict=True)]
    alt = f"{title}: per cent found at {', '.join(columns)} tokens, by depth. {'; '.join(found)}"
    return _picture(name, figure, alt)


def _per_cent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.0f}"


def _figure(title: str, unit: str, *, left: float = 54, right: float = 14, top: float = 50) -> tuple[Any, Any]:
    """A figure and its axes; the margins are in units of the picture."""
    import matplotlib
    from matplotlib.figure import Figure

    bottom, muted = 40, placeholder("muted")
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72)  # a pixel is a unit
        width, height = (WIDTH - left - right) / WIDTH, (HEIGHT - top - bottom) / HEIGHT
        axes = figure.add_axes((left / WIDTH, bottom / HEIGHT, width, height))
        title, place = short(title, int((WIDTH - 12) / BOLD)), dict[str, Any](va="top", ha="left")
        figure.text(6 / WIDTH, 1 - 4 / HEIGHT, title, weight="bold", size=FONT, color=placeholder("ink"), **place)
        figure.text(6 / WIDTH, 1 - 20 / HEIGHT, unit, size=SMALL, color=muted, **place)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set(color=muted, linewidth=0.8)
    axes.grid(axis="y", color=placeholder("grid"), linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=muted, labelsize=SMALL, length=0, pad=5)
    axes.tick_params(which="minor", length=0, labelsize=0)
    return figure, axes


def _finite(line: Series) -> Series:
    """The line with gaps (NaN) for what cannot be drawn, none of them at its end."""
    ys = [y if math.isfinite(y) else math.nan for y in line.y]
    until = max((position for position, y in enumerate(ys) if not math.isnan(y)), default=-1) + 1
    return Series(line.label, line.x[:until], ys[:until], line.colour, line.dashed)


def _scale(axis: Any, set_scale: Any, set_limits: Any, described: Axis, values: list[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if described.log2:
        set_scale("log", base=2)
        positive = [value for value in values if value > 0]
        if described.ticks is None and positive and max(positive) < 4 * min(positive):
            set_limits(min(positive) / 1.6, max(positive) * 1.6)
    if described.log10:
        set_scale("log", base=10)
    if described.limits is not None:
        set_limits(*described.limits)
    elif described.from_zero and not described.log2:
        set_limits(0, max([value for value in values if value > 0], default=1) * 1.08)
    if described.ticks is not None:
        axis.set_major_locator(FixedLocator(_thinned(described.ticks, described.form)))
    elif described.log2:
        axis.set_major_locator(LogLocator(base=2, numticks=6))
    elif described.log10:
        span = max(values) / min(value for value in values if value > 0)
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if span < 200 else (1,), numticks=6))
    else:
        axis.set_major_locator(MaxNLocator(5, integer=described.form is whole))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: described.form(value)))


def _thinned(ticks: list[float], form: Form) -> list[float]:
    """Every tick, or every second, third … where their labels would touch; the last one always."""
    room = (WIDTH - 120) / CHARACTER
    wanted = sum(len(form(tick)) + 2 for tick in ticks)
    step = max(1, math.ceil(wanted / room))
    return ticks[::-1][::step][::-1]


def _draw_marks(axes: Any, marks: Sequence[Mark], spans: bool) -> None:
    """Dashed lines, labelled above the axes: to the right of the line, or where that is taken to its left.

    Of spans the first needs no line, and one too narrow for its name has its number.
    """
    low, high = sorted(axes.get_xlim())
    inside = [(number, mark) for number, mark in enumerate(marks, 1) if (spans or low <= mark.x) and mark.x < high]
    box_end = axes.get_window_extent().width
    starts = [max(_across(axes, mark.x), 0.0) for _, mark in inside]
    taken = 0.0
    for start, stop, (number, mark) in zip(starts, [*starts, box_end][1:], inside, strict=True):
        if low <= mark.x and (number > 1 or not spans):
            axes.axvline(mark.x, color=placeholder(mark.colour), linewidth=1, linestyle=(0, (2, 2)))
        label = mark.label
        if spans and len(label) * CHARACTER > stop - start:
            label = "" if stop - start < 2 * CHARACTER else str(number)
        width = len(label) * CHARACTER
        leftwards = not spans and start + width > stop and start - width >= taken
        at = start - 3 if leftwards else max(start + 3, taken)
        taken = start if leftwards else at + width
        place = {"ha": "right" if leftwards else "left", "va": "bottom", "xytext": (0, 3), "xycoords": "axes fraction"}
        axes.annotate(label, (at / box_end, 1), color=placeholder(mark.colour), **place, **LABEL)


def _across(axes: Any, x: float) -> float:
    """Where a value lies, in units from the left of the axes."""
    height = axes.get_ylim()[1]  # any; 0 is nowhere on a logarithmic axis
    return float(axes.transData.transform((x, height))[0] - axes.get_window_extent().x0)


def _label_ends(axes: Any, series: Sequence[Series], labels: Sequence[str]) -> None:
    """Each label at the height of its line's end, moved apart where they would cover each other."""
    box, gap = axes.get_window_extent(), FONT + 2
    placed = [
        (axes.transData.transform((line.x[-1], line.y[-1]))[1], line.colour, label)
        for line, label in zip(series, labels, strict=True)
        if line.x
    ]
    placed.sort(key=lambda each: each[0])
    heights = [height for height, _, _ in placed]
    lowest, highest = box.y0 + gap / 2 - 4, box.y1 - gap / 2 + 8
    for _ in range(100 if len(heights) > 1 else 0):
        for position in range(len(heights) - 1):
            overlap = gap - (heights[position + 1] - heights[position])
            if overlap > 0.01:
                heights[position] -= overlap / 2
                heights[position + 1] += overlap / 2
        heights = [min(max(height, lowest), highest) for height in heights]
    place = {"ha": "left", "va": "center", "xytext": (7, 0), "xycoords": "axes fraction", "weight": "bold"}
    for height, (_, colour, label) in zip(heights, placed, strict=True):
        axes.annotate(label, (1, (height - box.y0) / box.height), color=placeholder(colour), **place, **LABEL)


def _ends(line: Series, x: Axis, y: Axis) -> str:
    first, last = (f"{y.form(line.y[at])} at {x.form(line.x[at])}" for at in (0, -1))
    return first if len(line.x) == 1 else f"{first}, {last}"


def _picture(name: str, figure: Any, alt: str) -> Picture:
    import matplotlib

    options = {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}
    buffer = io.StringIO()
    with matplotlib.rc_context(options), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that matplotlib's own font lacks; the reader's font draws them
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator")))
    return Picture(name, _clean(buffer.getvalue(), name, alt), alt, WIDTH)


def _clean(svg: str, name: str, alt: str) -> str:
    """One element that may stand in a page beside others: sized in its own units, identifiers of its own, a name."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*", f"font-family: {FAMILY}", svg)
    svg = svg.replace('xlink:href="#', 'href="#').replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    opening = f'{OPENING} aria-label="{escape(alt)}" stroke-linejoin="round">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1).strip() + "\n"
