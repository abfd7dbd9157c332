"""Colours by name, so that one drawing serves a light page and a dark one.

matplotlib draws in placeholders, one hexadecimal colour per name. `paint` exchanges them for the colours of a theme,
or for CSS variables that follow the page. Series are those of Okabe and Ito, which colour-blind people tell apart,
darker or brighter where the background asks for it; heat is a ramp of one hue, and numbers stand in its cells.
"""

import re
from typing import Literal

Theme = Literal["light", "dark", "page"]
SERIES = 6
LINES = 2 * SERIES
"""Lines that differ: the colours again, dotted."""
HEAT_LEVELS = 11


def _mix(low: str, high: str, share: float) -> str:
    pairs = zip(_parts(low), _parts(high), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def _parts(colour: str) -> list[int]:
    return [int(colour[start : start + 2], 16) for start in (1, 3, 5)]


def _ramp(low: str, middle: str, high: str) -> list[str]:
    half = (HEAT_LEVELS - 1) / 2
    return [
        _mix(low, middle, level / half) if level <= half else _mix(middle, high, level / half - 1)
        for level in range(HEAT_LEVELS)
    ]


def _palette() -> dict[str, tuple[str, str]]:
    """Name → colour on a light page, colour on a dark one."""
    palette = {
        "surface": ("#ffffff", "#14171c"),
        "ink": ("#1c2126", "#e8eaed"),
        "muted": ("#5c6670", "#9aa4af"),
        "grid": ("#e3e7eb", "#2c333b"),
        "teacher": ("#5c6670", "#b4bcc6"),
        "series1": ("#0072b2", "#56aee8"),
        "series2": ("#d55e00", "#f58a42"),
        "series3": ("#009e73", "#2fc79a"),
        "series4": ("#b0568e", "#e39ac6"),
        "series5": ("#b07d00", "#e9b93b"),
        "series6": ("#2b9cc9", "#8fd6f5"),
    }
    light = _ramp("#eef3f8", "#79afdd", "#08488c")
    dark = _ramp("#20272f", "#2f6da6", "#9dd2fb")
    for index in range(SERIES, LINES):
        palette[f"series{index + 1}"] = palette[f"series{index - SERIES + 1}"]
    for level in range(HEAT_LEVELS):
        palette[f"heat{level}"] = (light[level], dark[level])
        palette[f"on_heat{level}"] = ("#1c2126" if level <= 5 else "#ffffff", "#e8eaed" if level <= 6 else "#10151b")
    return palette


PALETTE = _palette()
_PLACEHOLDERS = {name: f"#ab{index:04x}" for index, name in enumerate(PALETTE)}
_NAMES = {placeholder: name for name, placeholder in _PLACEHOLDERS.items()}


def placeholder(name: str) -> str:
    """What to draw in."""
    return _PLACEHOLDERS[name]


def series(index: int) -> str:
    """The name of the colour of the student at `index`; after twelve they begin again."""
    return f"series{index % LINES + 1}"


def is_dotted(name: str) -> bool:
    """Whether a line of this colour is told by its dots from one that looks the same."""
    return name in {series(index) for index in range(SERIES, LINES)}


def paint(svg: str, theme: Theme) -> str:
    """The drawing in the colours of a theme; `page`: in the page's own, as CSS variables."""

    def colour(match: re.Match[str]) -> str:
        name = _NAMES[match.group()]
        return f"var(--{css_name(name)})" if theme == "page" else PALETTE[name][theme == "dark"]

    return re.sub(r"#ab[0-9a-f]{4}\b", colour, svg)


def css_name(name: str) -> str:
    return name.replace("_", "-")


def css_variables(theme: Literal["light", "dark"]) -> str:
    """The palette as declarations of CSS variables."""
    return " ".join(f"--{css_name(name)}: {pair[theme == 'dark']};" for name, pair in PALETTE.items())
