"""README and docs, and the code in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language ("" where none is named), in their order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)
    return [code for name, code in found if name == language]
