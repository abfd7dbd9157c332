"""Numbers and short texts as a person reads them: the same in tables, pictures and cards."""

import math
import re
from collections.abc import Callable, Sequence

NOTHING = "–"
MINUS = "−"
TIMES = "×"

Form = Callable[[float], str]

nats: Form = "{:.4f}".format
count: Form = "{:,.0f}".format
whole: Form = "{:.0f}".format
"""Indices such as layers, without separators."""
percent: Form = "{:.1%}".format
"""A share between 0 and 1."""


def shown(value: float | None, form: Form) -> str:
    """The number, or a dash where there is none."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    return form(value).replace("-", MINUS)


def decimals(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def figures(value: float) -> str:
    """Four significant figures, without an exponent where a person would write none."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def rate(value: float) -> str:
    """Per second."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def seconds(value: float) -> str:
    """A duration."""
    if value >= 120:
        return f"{value / 60:,.1f} min" if value < 7200 else f"{value / 3600:,.1f} h"
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def bytes_(value: float) -> str:
    """Memory in binary units."""
    units = ["B", "KiB", "MiB", "GiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.4g} {units[0]}" if abs(value) < 1024 else f"{value:,.0f} {units[0]}"


def length(value: float) -> str:
    """Tokens of a context: multiples of 1,024 as 2k for 2,048."""
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:,.0f}"


def amount(value: float) -> str:
    """Many tokens, on an axis: 36k, 13.9M, 1.2B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def signed(value: float, form: Form) -> str:
    """A difference, with its sign."""
    text = shown(abs(value), form)
    zero = not any(digit in text for digit in "123456789∞")
    return text if zero else f"{'+' if value > 0 else MINUS}{text}"


def ratio(value: float) -> str:
    """How many times as much, without an exponent: ×2.5, ×0.127, ×0.0000254."""
    if 0 < value < 1e-4:
        return f"{TIMES}{value:.{2 - math.floor(math.log10(value))}f}"
    return f"{TIMES}{value:.3g}" if value < 1000 else f"{TIMES}{value:,.0f}"


def one_line(text: str) -> str:
    """Text without line breaks, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:299]}…"


def slug(*words: str) -> str:
    """Words as the name of a file or an identifier."""
    return "-".join(filter(None, re.split(r"[^a-z0-9]+", " ".join(words).lower())))


def numbered(names: Sequence[str]) -> list[str]:
    """The names; those that occur more than once get a number."""
    return [
        f"{name} {names[: position + 1].count(name)}" if names.count(name) > 1 else name
        for position, name in enumerate(names)
    ]
