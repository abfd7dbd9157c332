"""Progress of an evaluation."""

from __future__ import annotations

from rich.console import Console

from distillkit.progress import ProgressReporter


class EvaluationProgress(ProgressReporter):
    """The unit that is measured, how many are done, and the time left, as if all units took equally long.

    Args:
        total: units that are to be measured.
    """

    def __init__(self, console: Console, total: int) -> None:
        super().__init__(console, total, seconds_between_lines=30)
        self._done = 0
        self._unit = ""

    def begin(self, unit: str) -> None:
        """A unit starts, or the loading of a model."""
        self._unit = unit
        self.advance(0, 1)

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` of the current unit are done."""
        part = min(done / total, 1)
        left = self.time_left(self._done + part)
        text = f"{self._unit}  {left}" if part == 0 else f"{self._unit}  {part:.0%}  {left}"
        self.update(self._done + part, f"{self._done}/{self._total}", text, line=text if part > 0 else None)

    def end(self, unit: str, seconds: float) -> None:
        """A unit is measured."""
        self._done += 1
        if self._bar is None:
            self.print(f"{self._done}/{self._total}  {unit}  {seconds:,.1f} s  {self.time_left(self._done)}")

    def fail(self, unit: str, error: str) -> None:
        """A unit cannot be measured."""
        self._done += 1
        self.print(f"{unit} failed: {error}")
