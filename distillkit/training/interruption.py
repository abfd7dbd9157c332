"""When a run saves besides `save_steps`: at Ctrl-C or SIGTERM, by the clock, and at its end.

A first Ctrl-C (or SIGTERM, which schedulers send before they kill) lets the current step finish, saves a checkpoint and
ends the training; a second one ends the process at once. torchrun passes a Ctrl-C on to processes that the terminal has
signalled already, so signals within a second of the first are taken as the same.
"""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from distillkit.console import INTERRUPTED
from distillkit.training.parallel import any_process

SAME_SIGNAL_SECONDS = 1.0


class SaveRequests(TrainerCallback):
    """Asks Trainer for checkpoints.

    Args:
        minutes: time between checkpoints, and one at the end; None where the user's training_args decide.
    """

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        self.interrupted = False
        self._first_signal = 0.0
        self._last_save = time.monotonic()
        self._handlers: dict[int, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """From here on a signal is a request."""
        self._last_save = time.monotonic()
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets the main thread alone handle signals
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._handle)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """All processes save and stop at the same step, whichever of them got the signal."""
        due = self.minutes is not None and time.monotonic() - self._last_save > 60 * self.minutes
        self.interrupted, due = any_process(args, self.interrupted, due)
        at_the_end = self.minutes is not None and state.global_step >= state.max_steps
        if self.interrupted:
            control.should_training_stop = True
        if self.interrupted or due or at_the_end:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The clock starts again."""
        self._last_save = time.monotonic()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Signals mean again what they meant before."""
        self.release()

    def release(self) -> None:
        """Give signals back their former meaning; called again, it does nothing."""
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.interrupted:
            self.interrupted, self._first_signal = True, now
        elif number == signal.SIGINT and now - self._first_signal > SAME_SIGNAL_SECONDS:
            os._exit(INTERRUPTED)
