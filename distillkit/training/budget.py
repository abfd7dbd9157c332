"""For how long a run trains: how many steps a budget in tokens is, and how many tokens a number of steps.

Rows differ in length, and which of them a run that ends within an epoch has read depends on their order. So tokens are
counted, not estimated: over the rows in the order in which the trainer will read them, which its seed decides. It is
the same order after the run was resumed.
"""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow.compute as pc
import torch
import xxhash
from datasets import Dataset
from rich.console import Console

from distillkit.config.errors import UserError
from distillkit.console import print_line
from distillkit.data.signals import list_lengths
from distillkit.formatting import token_text
from distillkit.runs.folder import PhaseFolder
from distillkit.training.origins import settle
from distillkit.training.parallel import main_process_first
from distillkit.training.trainer import DistillationTrainer


@dataclass(frozen=True)
class Schedule:
    """What a run will do, over all ranks."""

    steps: int
    """Steps of the optimizer."""
    tokens: int
    """Real tokens that they read."""
    times: float
    """How many times the training rows are read."""

    def __str__(self) -> str:
        return f"{self.steps:,} steps, {token_text(self.tokens)} tokens, {self.times:.3g} times through the data"


def set_steps(
    trainer: DistillationTrainer, rows: Dataset, budget: int | None, folder: PhaseFolder, console: Console
) -> Schedule:
    """Give the trainer the steps of a budget in tokens, or take those that it has; kept in `run.json`.

    Raises `UserError` where there are fewer rows than a batch has, and incomplete batches are dropped.
    """
    lengths, digest = scan_rows(rows, digested=folder.main_process)
    main_process_first(trainer.args, lambda: settle(folder, "dataset.train_dataset", "rows", digest))
    if len(trainer.get_train_dataloader()) == 0:
        raise UserError(
            "training_args.dataloader_drop_last",
            f"leaves no batch of the {len(rows):,} rows: fewer than one for each process; remove it, or lower "
            "per_device_train_batch_size",
        )
    steps = tokens_of_steps(trainer, lengths)
    if budget is None:
        *_, count = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
        tokens = sum(itertools.islice(steps, count))
    else:
        count, tokens = steps_of_budget(steps, budget)
        trainer.args.max_steps = count
        if tokens > budget and count == 1:
            print_line(console, f"tokens: {budget:,} are less than one step of {tokens:,}; one step is made")
    schedule = Schedule(count, tokens, tokens / int(lengths.sum()))
    folder.update_record(schedule=asdict(schedule))
    return schedule


def steps_of_budget(tokens_of_steps: Iterator[int], budget: int) -> tuple[int, int]:
    """How many steps come closest to the budget, at least one, and the tokens that they read."""
    steps = tokens = 0
    for step in tokens_of_steps:
        if steps and budget - tokens <= tokens + step - budget:
            break
        steps, tokens = steps + 1, tokens + step
        if tokens >= budget:
            break
    return max(steps, 1), tokens


def tokens_of_steps(trainer: DistillationTrainer, lengths: np.ndarray) -> Iterator[int]:
    """Real tokens of one step after the other, without end, from the first that the trainer makes; over all ranks.

    Of rows that the student will write, as many as it may write.
    """
    lengths = np.append(lengths, 0)  # of an empty row, which fills a batch
    loader, accumulated = trainer.get_train_dataloader(), trainer.args.gradient_accumulation_steps
    step = 0
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        batches = [lengths[indices] for indices in loader.batch_sampler]
        ours = []
        for start in range(0, len(batches), accumulated):
            rows = np.concatenate(batches[start : start + accumulated])
            if trainer.rollouts is not None:
                for row in trainer.rollouts.written_rows(step, len(rows)):
                    rows[row] = trainer.rollouts.most_tokens(step, row, len(rows))
            ours.append(int(rows.sum()))
            step += 1
        if not ours:
            return
        yield from trainer.of_all_rows(torch.tensor(ours).to(trainer.args.device)).tolist()


def scan_rows(rows: Dataset, *, digested: bool) -> tuple[np.ndarray, str | None]:
    """The number of tokens of each row, and a digest of all tokens where one is wanted: by one process of a run."""
    lengths, hashed = [], xxhash.xxh3_128()
    for batch in rows.select_columns("input_ids").with_format("arrow").iter(batch_size=1000):
        lengths.append(list_lengths(batch["input_ids"]))
        if digested:
            hashed.update(lengths[-1].tobytes())
            hashed.update(pc.list_flatten(batch["input_ids"]).to_numpy().astype(np.int32, copy=False))
    return np.concatenate(lengths), hashed.hexdigest() if digested else None
