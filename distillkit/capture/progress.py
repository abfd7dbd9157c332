"""Progress of a capture."""

from typing import Self

from rich.console import Console

from distillkit.progress import ProgressReporter


class CaptureProgress(ProgressReporter):
    """Tokens, tokens per second and time left.

    Args:
        total: tokens that this process is to capture.
    """

    def __init__(self, console: Console, total: int) -> None:
        super().__init__(console, total, seconds_between_lines=10)
        self.tokens = 0

    def __enter__(self) -> Self:
        super().__enter__()
        self.advance(0)
        return self

    def advance(self, tokens: int) -> None:
        self.tokens += tokens
        rate = self.tokens / max(self.seconds, 1e-9)
        figures = f"{self.tokens:,}/{self._total:,} tokens  {rate:,.0f} tokens/s  {self.time_left(self.tokens)}"
        self.update(self.tokens, "capturing", figures, f"captured {figures}")
