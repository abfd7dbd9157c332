"""On-policy distillation (GKD, arXiv 2306.13649): training rows that the student writes itself, before each step.

The student continues prompts by sampling, and the row is trained on as any other: the teacher's distribution at each
token that was written, whatever losses compare it with. Prompts and padding count nowhere, and no gradient flows
through the choice of tokens. All that is random follows from the seed, the step and the process: a run that is resumed
writes what it would have written.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from distillkit.config import RunConfig, UserError
from distillkit.config.rollouts import RolloutsConfig
from distillkit.data.collate import collate
from distillkit.data.prompts import read_prompts
from distillkit.evaluation.continuations import continue_prompts, drawn_numbers
from distillkit.evaluation.generation import batches_by_length, decoding_as_graphs, end_tokens
from distillkit.models.labels import IGNORED_LABEL
from distillkit.training.precision import compute_dtype
from distillkit.training.setup import Models

KEY = "rollouts.prompts"

CHANGED = ("input_ids", "targets", "position_ids", "lengths")
"""What of a batch says which tokens its rows have."""


@dataclass(frozen=True)
class Written:
    """What was written for a step by this process: rows, tokens, texts that ended by themselves, and seconds."""

    texts: int
    tokens: int
    ended: int
    seconds: float


class Rollouts:
    """Puts rows that the student writes in place of some of each step's.

    Args:
        settings: `rollouts` of the YAML.
        prompts: token ids, each of which leaves room for what is written in a row.
        sequence_length: tokens of a row; several prompts and what follows them share one where they fit.
        vocabulary_size: tokens that may be written, which both models know.
        process, processes: this one among those that train together.
        compute_dtype: of the student's matrix products.
    """

    def __init__(
        self,
        settings: RolloutsConfig,
        prompts: Sequence[Sequence[int]],
        *,
        sequence_length: int,
        vocabulary_size: int,
        process: int = 0,
        processes: int = 1,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.settings = settings
        self.prompts = prompts
        self.sequence_length = sequence_length
        self.vocabulary_size = vocabulary_size
        self.process, self.processes = process, processes
        self.compute_dtype = compute_dtype
        longest = max(map(len, prompts)) + settings.max_new_tokens
        self.texts_of_row = max(1, sequence_length // longest)

    def written_rows(self, step: int, rows: int) -> list[int]:
        """Those of this process's rows of a step that are written; over all rows and steps it is the wanted share."""
        first, share = (step * self.processes + self.process) * rows, self.settings.share
        return [row for row in range(rows) if floor((first + row + 1) * share) > floor((first + row) * share)]

    def most_tokens(self, step: int, row: int, rows: int) -> int:
        """Tokens of a written row, if none of its texts ends early."""
        return sum(len(prompt) + self.settings.max_new_tokens for prompt in self._prompts(step, row, rows))

    def write_into(
        self, batches: Sequence[dict[str, Tensor]], student: PreTrainedModel, step: int
    ) -> tuple[list[dict[str, Tensor]], Written]:
        """The micro-batches of a step with rows that `student` writes in place of some, and what was written."""
        start = time.perf_counter()
        sizes = [len(batch["input_ids"]) for batch in batches]
        rows = sum(sizes)
        wanted = self.written_rows(step, rows)
        prompts = [prompt for row in wanted for prompt in self._prompts(step, row, rows)]
        texts = self._write(student, prompts, step)
        made = iter(zip(prompts, texts, strict=True))
        batches = [{**batch, **{name: batch[name].clone() for name in CHANGED}} for batch in batches]
        for row in wanted:
            index, place = _place(row, sizes)
            _put(batches[index], place, [next(made) for _ in range(self.texts_of_row)])
        ends = end_tokens(student)
        return batches, Written(
            len(texts),
            sum(map(len, texts)),
            sum(text[-1] in ends for text in texts),
            time.perf_counter() - start,
        )

    def _prompts(self, step: int, row: int, rows: int) -> Iterator[Sequence[int]]:
        first = ((step * self.processes + self.process) * rows + row) * self.texts_of_row
        return (self.prompts[(first + text) % len(self.prompts)] for text in range(self.texts_of_row))

    def _write(self, student: PreTrainedModel, prompts: Sequence[Sequence[int]], step: int) -> list[list[int]]:
        key = (self.settings.seed, step, self.process)
        drawn = drawn_numbers(key, len(prompts), self.settings.max_new_tokens)
        texts: list[list[int]] = [[] for _ in prompts]
        training, device = student.training, next(student.parameters()).device
        student.eval()
        with (
            torch.autocast(device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32),
            torch.compiler.set_stance("force_eager"),  # a compiled layer is for whole rows
            decoding_as_graphs(student),
        ):
            for batch in batches_by_length(prompts, self.settings.batch_size):
                written = continue_prompts(
                    student,
                    [prompts[index] for index in batch],
                    drawn[batch],
                    new_tokens=self.settings.max_new_tokens,
                    temperature=self.settings.temperature,
                    ends=end_tokens(student),
                    columns=self.vocabulary_size,
                )
                for index, text in zip(batch, written, strict=True):
                    texts[index] = text
        student.train(training)
        return texts


def _put(batch: dict[str, Tensor], place: int, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Make a row of a batch of prompts and what followed them, its documents."""
    row: dict[str, Any] = {"input_ids": [], "labels": [], "seq_lengths": []}
    for prompt, text in texts:
        row["input_ids"] += [*prompt, *text]
        row["labels"] += [IGNORED_LABEL] * len(prompt) + list(text)
        row["seq_lengths"].append(len(prompt) + len(text))
    made = collate([row], pad_token_id=0, sequence_length=batch["input_ids"].shape[1])
    made["lengths"] = torch.tensor([len(row["input_ids"])])
    for name in CHANGED:
        batch[name][place] = made[name][0].to(batch[name].device)


def open_rollouts(config: RunConfig, models: Models, arguments: TrainingArguments) -> Rollouts | None:
    """What `rollouts` of a phase describes, if it has any. Raises `UserError` for prompts that cannot be continued."""
    if config.rollouts is None:
        return None
    prompts = prompts_of(config, models.tokenizer)
    largest = max(max(prompt) for prompt in prompts)
    if largest >= models.vocabulary_size:
        raise UserError(KEY, f"a prompt has token {largest}, and both models know the first {models.vocabulary_size:,}")
    return Rollouts(
        config.rollouts,
        prompts,
        sequence_length=config.sequence_length,
        vocabulary_size=models.vocabulary_size,
        process=arguments.process_index,
        processes=arguments.world_size,
        compute_dtype=compute_dtype(arguments),
    )


def prompts_of(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The prompts of a phase that has rollouts; each leaves room in a row. Raises `UserError` where there are none."""
    assert config.rollouts is not None
    settings = config.rollouts
    return read_prompts(
        settings.prompts,
        tokenizer,
        config.sequence_length - settings.max_new_tokens,
        text_field=settings.text_field,
        prompt_tokens=settings.prompt_tokens,
        seed=settings.seed,
        key=KEY,
    )


def _place(row: int, sizes: Sequence[int]) -> tuple[int, int]:
    """The micro-batch of a step's row, and its place there."""
    index = 0
    while row >= sizes[index]:
        row, index = row - sizes[index], index + 1
    return index, row
