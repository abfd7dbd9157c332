"""Batches for the trainer: those of `distillkit.data`, all of one shape, and how many of their tokens are real."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from distillkit.data.collate import collate


@dataclass(frozen=True)
class Collator:
    """`collate` with `lengths` [batch]: tokens of each row without its padding.

    signal_columns: a captured teacher's columns, collated with the tokens.
    prepare: adds what the teacher needs besides.
    """

    pad_token_id: int
    sequence_length: int | None = None
    signal_columns: tuple[str, ...] = ()
    prepare: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda batch: batch

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = collate(
            rows,
            pad_token_id=self.pad_token_id,
            sequence_length=self.sequence_length,
            signal_columns=self.signal_columns,
        )
        return {**self.prepare(batch), "lengths": torch.tensor([len(row["input_ids"]) for row in rows])}


class WholeBatches(Sampler[int]):
    """The rows of a pass in their order, and then as many empty ones as its last batch lacks.

    So no batch has another shape, for which kernels would be compiled and tuned again, and no process reads a row that
    another has read already in this pass, as accelerate would have it. An empty row has the index behind the last one
    (`data.signals.TensorRows`); nothing of it counts.

    Args:
        rows: the sampler of a pass.
        size: rows that all processes read at a time.
    """

    def __init__(self, rows: Sampler[int], size: int) -> None:
        self.rows = rows
        self.empty = -len(rows) % size  # type: ignore[arg-type]  # Trainer's have a length

    def __len__(self) -> int:
        return len(self.rows) + self.empty  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        yield from self.rows
        yield from itertools.repeat(len(self) - self.empty, self.empty)

    def set_epoch(self, epoch: int) -> None:
        """Which pass it is, by which a shuffle differs from another."""
        if isinstance(self.rows, SeedableRandomSampler):
            self.rows.set_epoch(epoch)


def padding_token(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> int:
    """The token that fills rows up. It is never looked at, so any that both models know will do."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in candidates if token is not None and token < vocabulary_size), 0)
