"""A report as Markdown, with its pictures beside it as files, each for light pages and for dark ones."""

import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

from distillkit.reporting.colours import paint
from distillkit.reporting.document import (
    Cell,
    Code,
    Details,
    Gallery,
    Heading,
    Paragraph,
    Part,
    Picture,
    Report,
    Section,
    Table,
)
from distillkit.reporting.plots import OPENING

PICTURES = "pictures"


def markdown(report: Report) -> str:
    """The whole report; its pictures are expected in `pictures/`."""
    blocks = [f"# {text(report.title)}"]
    blocks += ["\n".join(f"- {text(line)}" for line in report.lead)] if report.lead else []
    for section in report.sections:
        blocks += [f"## {text(section.title)}", *_blocks(section.parts)]
    return "\n\n".join(blocks) + "\n"


def table(content: Table) -> str:
    """A table of GitHub's Markdown; a row of one cell becomes a bold line in it."""
    width = len(content.header)
    lines = [
        _row([text(each) for each in content.header]),
        "|" + " --- |" + (" --- |" if content.words else " ---: |") * (width - 1),
    ]
    for row in content.rows:
        lines.append(_row([f"**{text(row[0].text)}**", *[""] * (width - 1)] if len(row) == 1 else _texts(row)))
    return "\n".join(lines)


def text(content: str) -> str:
    """Plain text, such that Markdown and HTML see nothing in it but text, on one line."""
    line = escape(" ".join(content.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", line)


def code(content: Code) -> str:
    """A block whose fence is longer than any in its text."""
    longest = max((len(run) for run in re.findall("`+", content.text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{content.language}\n{content.text.rstrip()}\n{fence}"


def write_pictures(report: Report, folder: Path) -> None:
    """`pictures/NAME.svg` and `NAME-dark.svg` for every picture of the report, in place of those of an earlier one."""
    for path in (folder / PICTURES).glob("*.svg"):
        if path.read_text(encoding="utf-8", errors="replace").startswith(OPENING):
            path.unlink()
    for section in report.sections:
        for picture in _pictures(section):
            (folder / PICTURES).mkdir(exist_ok=True)
            (folder / PICTURES / f"{picture.name}.svg").write_text(paint(picture.svg, "light"), encoding="utf-8")
            (folder / PICTURES / f"{picture.name}-dark.svg").write_text(paint(picture.svg, "dark"), encoding="utf-8")


def _blocks(parts: list[Part]) -> Iterator[str]:
    for part in parts:
        match part:
            case Paragraph():
                yield text(part.text)
            case Heading():
                yield f"### {text(part.text)}"
            case Table():
                yield table(part)
            case Code():
                yield code(part)
            case Gallery():
                yield "\n".join(_picture(picture) for picture in part.pictures)
            case Details():
                yield f"<details><summary>{escape(part.summary)}</summary>"
                yield from _blocks(part.parts)
                yield "</details>"


def _picture(picture: Picture) -> str:
    path, alt = f"{PICTURES}/{picture.name}", escape(picture.alt)
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{path}-dark.svg">'
    return f'<picture>{dark}<img src="{path}.svg" alt="{alt}" width="{picture.width}"></picture>'


def _pictures(section: Section) -> Iterator[Picture]:
    waiting = list(section.parts)
    while waiting:
        part = waiting.pop(0)
        if isinstance(part, Gallery):
            yield from part.pictures
        elif isinstance(part, Details):
            waiting += part.parts


def _texts(row: list[Cell]) -> list[str]:
    return [text(f"{cell.text} {cell.note}") for cell in row]


def _row(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"
