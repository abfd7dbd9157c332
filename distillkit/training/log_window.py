"""A line of the training log: losses, speed and what the student wrote in the steps since the line before."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from distillkit.training.distiller import DistillerOutput
from distillkit.training.rollouts import Written


class LogWindow:
    """What happened since the last line of the log. Sums stay on the device until the line is written."""

    def __init__(self) -> None:
        self._first_token: int | None = None
        self._start = time.perf_counter()
        self._totals: dict[str, Tensor] = {}
        self._written: list[Written] = []

    def add_written(self, written: Written) -> None:
        self._written.append(written)

    def add(self, output: DistillerOutput) -> None:
        for name, total in output["sums"].items():
            pair = torch.stack([total.float(), output["counts"][name].float()])
            self._totals[name] = self._totals.get(name, torch.zeros_like(pair)) + pair

    def begin(self, tokens: int) -> None:
        """Open the first window, at a count of `tokens`; later it does nothing."""
        if self._first_token is None:
            self._first_token, self._start = tokens, time.perf_counter()

    def close(self, tokens: int, over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Each loss's mean over its count, and the speed in real tokens up to `tokens`; a new window opens."""
        seconds = time.perf_counter() - self._start
        report: dict[str, float] = {}
        for name, pair in self._totals.items():
            total, count = over_ranks(pair).tolist()
            report[name] = total / max(count, 1.0)
        report["tokens_per_second"] = (tokens - (self._first_token or 0)) / max(seconds, 1e-9)
        if self._written:
            texts = max(sum(each.texts for each in self._written), 1)
            report["rollout_tokens"] = sum(each.tokens for each in self._written) / texts
            report["rollouts_ended"] = sum(each.ended for each in self._written) / texts
            report["rollout_time"] = sum(each.seconds for each in self._written) / max(seconds, 1e-9)
        self._first_token, self._start, self._totals, self._written = tokens, time.perf_counter(), {}, []
        return report

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A stretch of time that is not training."""
        entered = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - entered
