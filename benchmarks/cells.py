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


MOVED = {
    "recipes/smollm2_hybrid.yaml": "recipes/smollm2/hybrid.yaml",
    "tests/model/test_cuda.py": "tests/student/test_cuda.py",
    "tests/teacher/test_online.py": "tests/teacher/test_live.py",
    "tests/test_varlen_attention.py": "tests/models/test_varlen_attention.py",
}
"""Files that result files name as they were called then, and their names now."""


def named_now(text: str) -> str:
    """Text with the present names of files."""
    for then, now in MOVED.items():
        text = text.replace(then, now)
    return text


def source(file: str, content: Json, command: str) -> str:
    """Where numbers come from: the file, what they ran on, and the commands, folded if there are several."""
    machines = all_of("machine", content) or [{}]
    named = [machine.get("gpu") or machine.get("device") for machine in machines] + all_of("device", content)
    gpus = [gpu for gpu in dict.fromkeys(named) if gpu not in (None, "cpu", "cuda")]
    cpu = content.get("cpu") or machines[0].get("cpu")
    threads = f", {machines[0]['threads']} threads" if "threads" in machines[0] else ""
    device = " and ".join(gpus) or f"{cpu}{threads}"
    recorded = "; ".join(all_of("command", content)) or command
    commands = [*dict.fromkeys(recorded.split("; "))]
    how = "estimated" if content.get("estimate") else f"measured on {device}"
    origin = f"Source: [{file}](../benchmarks/results/{file}), {how}"
    if not recorded:
        return f"{origin}."
    if len(commands) == 1:
        return f"{origin} by `{commands[0]}`."
    block = "\n".join(["```sh", *commands, "```"])
    return f"{origin}.\n\n<details><summary>Commands</summary>\n\n{block}\n\n</details>"


def all_of(key: str, content: Json) -> list[Any]:
    """The values of a key: those of the file and of the run that it continued, or else those of each of its parts."""
    if key in content:
        return [*all_of(key, content.get("before", {})), content[key]]
    return [found for part in content.values() if isinstance(part, dict) for found in all_of(key, part)]
