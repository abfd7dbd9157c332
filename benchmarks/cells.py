"""Cells, tables and sources of docs/results.md."""

import math
from collections.abc import Sequence
from typing import Any

from distillkit.reporting import numbers
from distillkit.reporting.document import Picture
from frame import Json

Part = str | Picture
"""Markdown, or a picture."""


def grid(header: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False) -> str:
    """A table of Markdown: the first column to the left, the others to the right unless they are words."""
    lines = [header, ["---", *["---" if words else "---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: Any) -> str:
    """A value of a result file in a cell, to four figures if it is a number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return numbers.NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return numbers.figures(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def source(file: str, content: Json, command: str) -> str:
    """Where numbers come from: the file, the commands that wrote it, and what they ran on."""
    machines = all_of("machine", content) or [{}]
    named = [machine.get("gpu") or machine.get("device") for machine in machines] + all_of("device", content)
    gpus = [gpu for gpu in dict.fromkeys(named) if gpu not in (None, "cpu", "cuda")]
    cpu = content.get("cpu") or machines[0].get("cpu")
    threads = f", {machines[0]['threads']} threads" if "threads" in machines[0] else ""
    device = " and ".join(gpus) or f"{cpu}{threads}"
    commands = dict.fromkeys(all_of("command", content) or [command])
    return f"[{file}](../benchmarks/results/{file}): {'; '.join(f'`{each}`' for each in commands)}, on {device}."


def all_of(key: str, content: Json) -> list[Any]:
    """The values of a key: those of the file and of the run that it continued, or else those of each of its parts."""
    if key in content:
        return [*all_of(key, content.get("before", {})), content[key]]
    return [found for part in content.values() if isinstance(part, dict) for found in all_of(key, part)]
