"""What a capture says while it runs: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from distillkit.console import clock, print_line

_SECONDS_BETWEEN_LINES = 10.0


class CaptureProgress:
    """Tokens, tokens per second and time left.

    Args:
        total: tokens that this process is to capture.
    """

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._start = self._last_line = time.perf_counter()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self.tokens = 0

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._start

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / max(self.seconds, 1e-9)

    def __enter__(self) -> CaptureProgress:
        self._start = self._last_line = time.perf_counter()
        if self._console.is_terminal:
            columns = TextColumn("capturing"), BarColumn(bar_width=20), TextColumn("{task.description}")
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task(self._figures(), total=self._total)
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, tokens: int) -> None:
        """So many more tokens have been captured."""
        self.tokens += tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=self.tokens, description=self._figures())
        elif time.perf_counter() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.perf_counter()
            left = clock((self._total - self.tokens) / self.rate)
            print_line(self._console, f"captured {self._figures()}  left {left}")

    def _figures(self) -> str:
        return f"{self.tokens:,}/{self._total:,} tokens  {self.rate:,.0f} tokens/s"
