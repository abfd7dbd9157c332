"""The parts of a report or a model card, and how they become Markdown with pictures beside it, or one HTML page.

All text in the parts is plain, as it came out of the files; `markdown` and `html` escape it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from distillkit.reporting.colours import css_variables, paint
from distillkit.reporting.numbers import slug

PICTURES = "pictures"
WIDTH, HEIGHT = 400, 250
OPENING = (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
    'role="img"'
)
"""What a picture of ours begins with."""

Tone = Literal["", "better", "worse"]


@dataclass(frozen=True)
class Cell:
    """A cell of a table, whether it is good news, and a note that stands below it where there is little room."""

    text: str
    tone: Tone = ""
    note: str = ""


Row = Sequence[Cell | str]


@dataclass(frozen=True)
class Table:
    """Columns of numbers (or `words`) under a header; the first names the rows. A row of one cell is a heading."""

    header: Row
    rows: Sequence[Row]
    words: bool = False


@dataclass(frozen=True)
class Bullets:
    lines: list[str]


@dataclass(frozen=True)
class Code:
    text: str
    language: str = ""


@dataclass(frozen=True)
class Picture:
    """An SVG whose colours are names of the palette (`reporting.colours`), and the same in words."""

    name: str
    svg: str
    alt: str
    width: int


@dataclass(frozen=True)
class Gallery:
    """Pictures that stand beside each other where there is room."""

    pictures: list[Picture]


@dataclass(frozen=True)
class Section:
    """A title and what is under it, sections too. A whole document is one; a `folded` one opens on a click."""

    title: str
    parts: "Sequence[Part]"
    folded: bool = False


Part = str | Bullets | Table | Code | Gallery | Section
"""A string is a paragraph."""


def markdown(document: Section) -> str:
    """The document in GitHub's Markdown; its pictures are expected in `pictures/`."""
    return "\n\n".join(_blocks(document, 1)) + "\n"


def html(document: Section) -> str:
    """The page, with style and pictures inside. It follows the reader's theme. All text out of files is escaped."""
    return _page().render(
        title=document.title,
        lead=[part for part in document.parts if not isinstance(part, Section)],
        sections=[part for part in document.parts if isinstance(part, Section)],
        light=Markup(css_variables("light")),
        dark=Markup(css_variables("dark")),
        svg=lambda picture: Markup(paint(picture.svg, "page")),
        kind=lambda part: type(part).__name__,
        slug=slug,
    )


@cache
def _page() -> Template:
    environment = Environment(
        loader=PackageLoader("distillkit.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def write_pictures(document: Section, folder: Path) -> None:
    """Write `pictures/NAME.svg` and `NAME-dark.svg` for every picture, in place of those of an earlier report."""
    for path in (folder / PICTURES).glob("*.svg"):
        if path.read_text(encoding="utf-8", errors="replace").startswith(OPENING):
            path.unlink()
    for picture in _pictures(document):
        (folder / PICTURES).mkdir(exist_ok=True)
        (folder / PICTURES / f"{picture.name}.svg").write_text(paint(picture.svg, "light"), encoding="utf-8")
        (folder / PICTURES / f"{picture.name}-dark.svg").write_text(paint(picture.svg, "dark"), encoding="utf-8")


def table(content: Table) -> str:
    """A table in Markdown; a row of one cell becomes a bold line in it."""
    width = len(content.header)
    lines = [_row(content.header), "|" + " --- |" + (" --- |" if content.words else " ---: |") * (width - 1)]
    for row in content.rows:
        lines.append(f"| **{_cell(row[0])}** |" + "  |" * (width - 1) if len(row) == 1 else _row(row))
    return "\n".join(lines)


def _blocks(part: Part, level: int) -> Iterator[str]:
    match part:
        case str():
            yield _text(part)
        case Bullets():
            yield "\n".join(f"- {_text(line)}" for line in part.lines)
        case Table():
            yield table(part)
        case Code():
            longest = max((len(run) for run in re.findall("`+", part.text)), default=0)
            fence = "`" * max(3, longest + 1)
            yield f"{fence}{part.language}\n{part.text.rstrip()}\n{fence}"
        case Gallery():
            yield "\n".join(_picture(picture) for picture in part.pictures)
        case Section():
            summary = f"<details><summary>{escape(part.title)}</summary>"
            yield summary if part.folded else f"{'#' * level} {_text(part.title)}"
            for each in part.parts:
                yield from _blocks(each, level + (not part.folded))
            if part.folded:
                yield "</details>"


def _row(row: Row) -> str:
    return f"| {' | '.join(map(_cell, row))} |"


def _cell(cell: Cell | str) -> str:
    return _text(cell if isinstance(cell, str) else f"{cell.text} {cell.note}")


def _text(content: str) -> str:
    """Plain text, such that Markdown and HTML see nothing in it but text, on one line."""
    line = escape(" ".join(content.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", line)


def _picture(picture: Picture) -> str:
    path, alt = f"{PICTURES}/{picture.name}", escape(picture.alt)
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{path}-dark.svg">'
    return f'<picture>{dark}<img src="{path}.svg" alt="{alt}" width="{picture.width}"></picture>'


def _pictures(part: Part) -> Iterator[Picture]:
    if isinstance(part, Gallery):
        yield from part.pictures
    elif isinstance(part, Section):
        for each in part.parts:
            yield from _pictures(each)
