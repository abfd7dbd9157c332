"""What a report is made of, before it is Markdown or HTML: sections of text, tables, pictures and code.

All of it is plain text, as it came out of the files: escaping is the business of whoever writes it down.
"""

from dataclasses import dataclass, field
from typing import Literal

Tone = Literal["", "better", "worse"]


@dataclass(frozen=True)
class Cell:
    """A cell of a table, whether it is good news, and a note that may stand below it where there is little room."""

    text: str
    tone: Tone = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Columns of numbers (or `words`) under a header; the first names the rows. A row of one cell is a heading."""

    header: list[str]
    rows: list[list[Cell]]
    words: bool = False


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    text: str


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
class Details:
    """What only some readers want; folded."""

    summary: str
    parts: "list[Part]"


Part = Paragraph | Heading | Table | Code | Gallery | Details


@dataclass(frozen=True)
class Section:
    title: str
    parts: list[Part]

    @property
    def anchor(self) -> str:
        """The title as an identifier."""
        return "-".join(self.title.lower().split())


@dataclass(frozen=True)
class Report:
    """`lead`: what a reader in a hurry should know, one sentence each."""

    title: str
    lead: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)


def cells(*texts: str) -> list[Cell]:
    """A row without good or bad news."""
    return [Cell(text) for text in texts]
