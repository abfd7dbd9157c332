"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from distillkit.console import clock, print_line


class ProgressReporter:
    """Shows how much of `total` is done, and the time left. To be used in a `with` block.

    Args:
        total: in any unit; for 0 there is no bar.
        seconds_between_lines: the least time between two lines where there is no bar.
        before: what of the total was done already, in a time that is not known.
    """

    def __init__(self, console: Console, total: int, seconds_between_lines: float, before: int = 0) -> None:
        self._console = console
        self._total = total
        self._before = before
        self._seconds_between_lines = seconds_between_lines
        self._start = self._last_line = time.perf_counter()
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        self._start = self._last_line = time.perf_counter()
        if self._console.is_terminal and self._total:
            columns = TextColumn("{task.fields[title]}"), BarColumn(bar_width=20), TextColumn("{task.description}")
            self._bar = Progress(*columns, console=self._console)
            self._bar.add_task("", total=self._total, completed=self._before, title="")
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._start

    def time_left(self, done: float) -> str:
        """`left 0:01:02`, if the rest takes as long as what is done."""
        now = done - self._before
        return f"left {clock(self.seconds / now * (self._total - done)) if now else '-:--:--'}"

    def update(self, done: float, title: str, description: str, line: str | None = None) -> None:
        """Move the bar, between title and description; without a bar print `line`, unless the last was just before."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, title=title, description=description)
        elif line is not None and time.perf_counter() - self._last_line > self._seconds_between_lines:
            self.print(line)

    def print(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        self._last_line = time.perf_counter()
        print_line(self._console, line)
