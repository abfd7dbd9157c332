"""`metrics.jsonl`: each logged line of a run as JSON, one per line. A loss that is not finite is null."""

import json
from pathlib import Path
from typing import Any

from distillkit.runs.names import METRICS
from distillkit.runs.writing import json_text, write_whole

NOT_LOSSES = ("step", "epoch", "tokens", "tokens_per_second", "seconds", "grad_norm", "learning_rate")
"""Keys of a line that are no losses; all others are."""

Line = dict[str, Any]


def read_metrics(folder: Path) -> list[Line]:
    """The lines in a run's folder; a last line that was cut off by a kill is left out."""
    path = folder / METRICS
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def append_metrics(folder: Path, line: Line) -> None:
    with (folder / METRICS).open("a") as file:
        file.write(json_text(line) + "\n")


def truncate_metrics(folder: Path, step: int) -> list[Line]:
    """Drop the lines of later steps, which a resumed run makes again; those that are kept."""
    kept = [line for line in read_metrics(folder) if line["step"] <= step]
    write_whole(folder / METRICS, "".join(json_text(line) + "\n" for line in kept).encode())
    return kept
