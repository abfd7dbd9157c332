"""Batches for the trainer: those of `distillkit.data`, and how many of their tokens are real."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
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


def padding_token(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> int:
    """The token that fills rows up. It is never looked at, so any that both models know will do."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in candidates if token is not None and token < vocabulary_size), 0)
