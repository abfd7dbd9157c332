"""What an evaluation says while it runs: a bar on a terminal, a line per unit and now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from distillkit.console import clock, print_line

_SECONDS_BETWEEN_LINES = 30.0


class EvaluationProgress:
    """Which unit runs, how many of how many are done, and the time left: units count alike, as far as they have come.

    Args:
        total: units that are to be measured.
    """

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._done = 0.0
        self._unit = ""
        self._start = self._last_line = time.perf_counter()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> EvaluationProgress:
        if self._console.is_terminal and self._total:
            columns = (TextColumn("{task.fields[count]}"), BarColumn(bar_width=20), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("", total=self._total, count=f"0/{self._total}")
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, unit: str) -> None:
        """A unit starts, or the loading of a model."""
        self._unit = unit
        self.reach(0, 1)

    def reach(self, done: int, total: int) -> None:
        """So much of the unit is done."""
        part = min(done / total, 1)
        left = f"left {self._left(part)}"
        if self._bar is not None:
            shown = f"{self._unit}  {left}" if part == 0 else f"{self._unit}  {part:.0%}  {left}"
            count = f"{int(self._done)}/{self._total}"
            self._bar.update(self._task, completed=self._done + part, description=shown, count=count)
        elif part > 0 and time.perf_counter() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._line(f"{self._unit}  {part:.0%}  {left}")

    def end(self, unit: str, seconds: float) -> None:
        """A unit is through."""
        self._done += 1
        if self._bar is None:
            self._line(f"{int(self._done)}/{self._total}  {unit}  {seconds:,.1f} s  left {self._left(0)}")

    def fail(self, unit: str, error: str) -> None:
        """A unit cannot be measured."""
        self._done += 1
        self._line(f"{unit} failed: {error}")

    def _line(self, line: str) -> None:
        self._last_line = time.perf_counter()
        print_line(self._console, line)

    def _left(self, part: float) -> str:
        done = self._done + part
        if done == 0:
            return "-:--:--"
        return clock((time.perf_counter() - self._start) / done * (self._total - done))
