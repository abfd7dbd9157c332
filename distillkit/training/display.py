"""What a run shows while it trains: a bar on a terminal, plain lines elsewhere, and `metrics.jsonl` always."""

import importlib
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from distillkit.console import clock, print_line
from distillkit.runs.metrics import NOT_LOSSES, append_metrics, truncate_metrics


class MetricsFile(TrainerCallback):
    """Each logged line in `metrics.jsonl`, with the seconds trained until then."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seconds_before = 0.0
        self._start = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep what the resumed checkpoint knows of."""
        if not state.is_world_process_zero:
            return
        kept = truncate_metrics(self._folder, state.global_step)
        self._seconds_before = kept[-1]["seconds"] if kept else 0.0
        self._start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The last step is logged, whatever `logging_steps` is."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a line."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        seconds = self._seconds_before + time.perf_counter() - self._start
        append_metrics(self._folder, {"step": state.global_step, **logs, "seconds": round(seconds, 3)})


def finish_trackers(arguments: TrainingArguments) -> None:
    """End what trackers leave open for whatever else the process logs: the next phase is a run of its own."""
    if "wandb" in arguments.report_to:
        importlib.import_module("wandb").finish()


class ProgressDisplay(TrainerCallback):
    """Step, tokens, tokens per second, each loss, learning rate and time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._first_step = 0
        self._start = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the bar, on a terminal."""
        self._first_step, self._start = state.global_step, time.perf_counter()
        if not state.is_world_process_zero or not self._console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            _TimeLeft(),
            _Figures(),
            console=self._console,
        )
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, figures="")
        self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            left = self._seconds_left(state)
            self._bar.update(self._task, completed=state.global_step, left=left)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the figures beside the bar, or as a line."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        if self._bar is not None and "loss" in logs:
            self._bar.update(self._task, figures=figures(logs))
            return
        left = f"  left {clock(self._seconds_left(state))}" if "loss" in logs else ""
        print_line(self._console, f"step {state.global_step}/{state.max_steps}  {figures(logs)}{left}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the bar as it stands."""
        self.close()

    def close(self) -> None:
        """Give the terminal back; called again, it does nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _seconds_left(self, state: TrainerState) -> float:
        done = state.global_step - self._first_step
        spent = time.perf_counter() - self._start
        return spent / max(done, 1) * (state.max_steps - state.global_step)


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


class _TimeLeft(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(clock(task.fields["left"]) if "left" in task.fields else "-:--:--")


class _Figures(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["figures"])
