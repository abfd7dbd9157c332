"""Colours by name, so that one drawing serves a light page and a dark one.

matplotlib draws in placeholders, one hexadecimal colour per name. `paint` exchanges them for the colours of a theme,
or for CSS variables that follow the page. Series are those of Okabe and Ito, which colour-blind people tell apart,
darker or brighter where the background needs it; heat is a ramp of one hue, and numbers stand in its cells.
"""

import re
from typing import Literal

Theme = Literal["light", "dark", "page"]
SERIES = 6
LINES = 2 * SERIES
"""Lines that differ: the colours again, dotted."""

# fmt: off
_LIGHT_HEAT = [
    "#eef3f8", "#d7e5f3", "#bfd8ed", "#a8cae8", "#90bde2", "#79afdd",
    "#629acd", "#4c86bd", "#3571ac", "#1f5d9c", "#08488c",
]
_DARK_HEAT = [
    "#20272f", "#233547", "#26435f", "#295176", "#2c5f8e", "#2f6da6",
    "#4581b7", "#5b95c8", "#71aad9", "#87beea", "#9dd2fb",
]
# fmt: on
HEAT_LEVELS = len(_LIGHT_HEAT)

PALETTE: dict[str, tuple[str, str]] = {
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
"""Name → colour on a light page, colour on a dark one."""
DOTTED = [f"series{index}" for index in range(SERIES + 1, LINES + 1)]
"""Dots tell a line of these from one of the first six."""
PALETTE |= {f"series{index + SERIES}": PALETTE[f"series{index}"] for index in range(1, SERIES + 1)}
for _level, _heat in enumerate(zip(_LIGHT_HEAT, _DARK_HEAT, strict=True)):
    PALETTE[f"heat{_level}"] = _heat
    PALETTE[f"on-heat{_level}"] = ("#1c2126" if _level <= 5 else "#ffffff", "#e8eaed" if _level <= 6 else "#10151b")

_PLACEHOLDERS = {name: f"#ab{index:04x}" for index, name in enumerate(PALETTE)}
_NAMES = {placeholder: name for name, placeholder in _PLACEHOLDERS.items()}


def placeholder(name: str) -> str:
    """The colour to draw in."""
    return _PLACEHOLDERS[name]


def series(index: int) -> str:
    """The name of the colour of the student at `index`; after twelve they begin again."""
    return f"series{index % LINES + 1}"


def paint(svg: str, theme: Theme) -> str:
    """The drawing in the colours of a theme; `page`: as CSS variables of the page around it."""

    def colour(match: re.Match[str]) -> str:
        name = _NAMES[match.group()]
        return f"var(--{name})" if theme == "page" else PALETTE[name][theme == "dark"]

    return re.sub(r"#ab[0-9a-f]{4}\b", colour, svg)


def css_variables(theme: Literal["light", "dark"]) -> str:
    """The palette as declarations of CSS variables."""
    return " ".join(f"--{name}: {pair[theme == 'dark']};" for name, pair in PALETTE.items())
