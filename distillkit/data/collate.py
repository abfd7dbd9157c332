"""Rows to batches. Document boundaries are in `position_ids` alone, which start from 0 at each document.

Both transformers' attention masks and the layers of this package find documents there. The padding at the end of a row
is a document of its own, so that no attention mask is needed, packed or not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from distillkit.models.labels import IGNORED_LABEL, shifted_labels


def collate(
    rows: Sequence[Mapping[str, Any]],
    *,
    pad_token_id: int,
    sequence_length: int | None = None,
    signal_columns: Sequence[str] = (),
) -> dict[str, Shaped[Tensor, "batch tokens *width"]]:
    """`input_ids`, `targets` and `position_ids` [batch, tokens] of rows as `build_dataset` makes them.

    A target is what a position predicts: the label of the next token, or -100.

    sequence_length: tokens per row of the batch; by default those of its longest row.
    signal_columns: columns with a list of numbers per token, which become [batch, tokens, width], with 0 as padding.
    """
    tokens = sequence_length or max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), tokens)
    input_ids = torch.full(shape, pad_token_id)
    targets = torch.full(shape, IGNORED_LABEL)
    position_ids = torch.empty(shape, dtype=torch.long)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[index, :length] = torch.as_tensor(row["input_ids"])
        targets[index, :length] = shifted_labels(torch.as_tensor(row["labels"]))
        documents = [*row["seq_lengths"], tokens - length]
        position_ids[index] = torch.cat([torch.arange(length) for length in documents])
    signals = {name: _padded([torch.as_tensor(row[name]) for row in rows], tokens) for name in signal_columns}
    return {"input_ids": input_ids, "targets": targets, "position_ids": position_ids, **signals}


def _padded(signals: Sequence[Shaped[Tensor, "_ width"]], tokens: int) -> Shaped[Tensor, "batch tokens width"]:
    padded = signals[0].new_zeros(len(signals), tokens, signals[0].shape[-1])
    for row, signal in zip(padded, signals, strict=True):
        row[: len(signal)] = signal
    return padded
