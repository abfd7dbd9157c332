"""Numbers as a person reads them: the same in tables, pictures and cards."""

import math
import re
from collections.abc import Callable

NOTHING = "–"
MINUS = "−"
TIMES = "×"

Form = Callable[[float], str]


def shown(value: float | None, form: Form) -> str:
    """The number, or a dash where there is none."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    return form(value).replace("-", MINUS)


def nats(value: float) -> str:
    return f"{value:.4f}"


def decimals(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def count(value: float) -> str:
    return f"{value:,.0f}"


def whole(value: float) -> str:
    """Layers, steps: things that are counted."""
    return f"{value:.0f}"


def percent(value: float) -> str:
    """A share between 0 and 1."""
    return f"{100 * value:.1f}%"


def figures(value: float) -> str:
    """Four significant figures, without an exponent where a person would write none."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def rate(value: float) -> str:
    """Per second."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def seconds(value: float) -> str:
    """A time to wait."""
    if value >= 120:
        return f"{value / 60:,.1f} min" if value < 7200 else f"{value / 3600:,.1f} h"
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def bytes_(value: float) -> str:
    """Memory in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:.4g} {unit}" if abs(value) < 1024 else f"{value:,.0f} {unit}"
        value /= 1024
    raise AssertionError


def length(value: float) -> str:
    """Tokens of a context: powers of two as people say them, 2k for 2,048."""
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
    """How many times as much; of little, how many times less."""
    if 0 < value < 0.1:
        return f"{1 / value:.3g} times less" if value > 0.001 else f"{1 / value:,.0f} times less"
    return f"{TIMES}{value:.3g}" if value < 1000 else f"{TIMES}{value:,.0f}"


def one_line(text: str) -> str:
    """Text without line breaks, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:299]}…"


def slug(*words: str) -> str:
    """Words as the name of a file or an identifier."""
    return "-".join(filter(None, re.split(r"[^a-z0-9]+", " ".join(words).lower())))
