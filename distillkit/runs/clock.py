"""Where the seconds of a run go: each counts for the part of the run that was at work, and the parts are the whole.

A part is open within `span`. Within another span, the inner one alone counts.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

STARTING = "starting"
"""From the start of the command: Python, imports, reading the configuration."""
MODELS = "loading models"
CONVERSION = "conversion"
FILES = "checking files"
TEXT = "tokenising"
FIRST_STEPS = "first steps"
"""Those in which kernels are compiled and tuned: a phase's first three."""
STEPS = "steps"
EVALUATION = "evaluation"
CHECKPOINTS = "checkpoints"
SAVING = "saving"
SAMPLES = "samples"
REPORT = "report"
REST = "rest"


class Clock:
    """Seconds per part since it was made, or since `started` (as `time.time()` counts), which are of starting."""

    def __init__(self, started: float | None = None) -> None:
        self._since = time.perf_counter()
        self._open = [REST]
        self._seconds: dict[str, float] = {}
        self._at_last_lap: dict[str, float] = {}
        if started is not None:
            self._seconds[STARTING] = time.time() - started

    @contextmanager
    def span(self, part: str) -> Iterator[None]:
        self._count()
        self._open.append(part)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def turn_to(self, part: str) -> None:
        """The innermost open span goes on as another part."""
        self._count()
        self._open[-1] = part

    def seconds(self) -> dict[str, float]:
        """Per part, in the order in which they first ended; what no span names is `rest`, and comes last."""
        self._count()
        return {**{part: self._seconds[part] for part in self._seconds if part != REST}, REST: self._seconds[REST]}

    def lap(self) -> dict[str, float]:
        """Per part, since the last lap ended or all began."""
        before, self._at_last_lap = self._at_last_lap, self.seconds()
        lap = {part: seconds - before.get(part, 0.0) for part, seconds in self._at_last_lap.items()}
        return {part: seconds for part, seconds in lap.items() if seconds > 0.0}

    def _count(self) -> None:
        now = time.perf_counter()
        self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now


def command_clock() -> Clock:
    """The clock of a command, which began with this process."""
    return Clock(psutil.Process().create_time())


def clock_record(seconds: dict[str, float]) -> dict[str, float]:
    """As results keep it: the sum of all parts, and these."""
    return {"total": round(sum(seconds.values()), 2), **{part: round(each, 2) for part, each in seconds.items()}}


def clock_text(record: dict[str, float]) -> str:
    """`68 s: starting 9.1, conversion 3.2, steps 50`; what would be 0.0 is left out."""
    texts = {part: f"{seconds:.1f}" if seconds < 9.95 else f"{seconds:,.0f}" for part, seconds in record.items()}
    total = texts.pop("total")
    return f"{total} s: {', '.join(f'{part} {text}' for part, text in texts.items() if text != '0.0')}"
