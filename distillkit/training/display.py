"""What a run shows while it trains: a bar on a terminal, plain lines elsewhere, and `metrics.jsonl` always."""

import importlib
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from distillkit.progress import ProgressReporter
from distillkit.runs.clock import STEPS, Clock
from distillkit.runs.metrics import NOT_LOSSES, append_metrics, truncate_metrics


class MetricsFile(TrainerCallback):
    """Each logged line in `metrics.jsonl`, with the seconds trained until then."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seconds_before = 0.0
        self._start = time.perf_counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep what the resumed checkpoint knows of."""
        if not state.is_world_process_zero:
            return
        kept = truncate_metrics(self._folder, state.global_step)
        self._seconds_before = kept[-1]["seconds"] if kept else 0.0
        self._start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The last step is logged, whatever `logging_steps` is."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        seconds = self._seconds_before + time.perf_counter() - self._start
        append_metrics(self._folder, {"step": state.global_step, **logs, "seconds": round(seconds, 3)})


class FirstSteps(TrainerCallback):
    """Tells a run's clock when the first steps are made, in which kernels are compiled and tuned."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._made = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._made += 1
        if self._made == 3:
            self._clock.turn_to(STEPS)


def finish_trackers(arguments: TrainingArguments) -> None:
    """End what trackers leave open for whatever else the process logs: the next phase is a run of its own."""
    if "wandb" in arguments.report_to:
        importlib.import_module("wandb").finish()


class ProgressDisplay(TrainerCallback):
    """Step, tokens, tokens per second, each loss, learning rate and time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = ProgressReporter(console, 0, 0)
        self._figures = ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draw the bar, on a terminal."""
        if state.is_world_process_zero:
            self._progress = ProgressReporter(self._console, state.max_steps, 0, before=state.global_step)
            self._progress.__enter__()
            self._show(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._show(state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Show the figures beside the bar, or as a line."""
        if "train_runtime" in logs:
            return
        line = f"step {state.global_step}/{state.max_steps}  {figures(logs)}"
        if "loss" in logs:
            self._figures = figures(logs)
            self._show(state, f"{line}  {self._progress.time_left(state.global_step)}")
        else:
            self._progress.print(line)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; called again, it does nothing."""
        self._progress.__exit__()

    def _show(self, state: TrainerState, line: str | None = None) -> None:
        done = state.global_step
        description = f"{self._progress.time_left(done)}  {self._figures}"
        self._progress.update(done, f"step {done}/{state.max_steps}", description, line)


def figures(logs: dict[str, Any]) -> str:
    """`412,160 tokens  5,130 tokens/s  loss 1.204  kl 0.811  lr 9.8e-04` from what was logged."""
    parts = []
    if "tokens" in logs:
        parts += [f"{logs['tokens']:,} tokens", f"{logs['tokens_per_second']:,.0f} tokens/s"]
    parts += [
        f"{name} {value:.4g}"
        for name, value in logs.items()
        if name not in NOT_LOSSES and isinstance(value, int | float)
    ]
    if "learning_rate" in logs:
        parts.append(f"lr {logs['learning_rate']:.2e}")
    return "  ".join(parts)
