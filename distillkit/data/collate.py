"""Rows to batches. Document boundaries travel in `position_ids` alone, which start from 0 at each document.

transformers' attention masks and the layers of this package both find documents there. The padding at the end of a row
is a document of its own, so that no attention mask is needed, packed or not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


def collate(
    rows: Sequence[Mapping[str, Any]], *, pad_token_id: int, sequence_length: int | None = None
) -> dict[str, Int[Tensor, "batch tokens"]]:
    """`input_ids`, `labels` and `position_ids` of rows as `build_dataset` makes them.

    sequence_length: tokens per row of the batch; by default those of its longest row.
    """
    tokens = sequence_length or max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), tokens)
    input_ids = torch.full(shape, pad_token_id)
    labels = torch.full(shape, -100)
    position_ids = torch.empty(shape, dtype=torch.long)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[index, :length] = torch.as_tensor(row["input_ids"])
        labels[index, :length] = torch.as_tensor(row["labels"])
        documents = [*row["seq_lengths"], tokens - length]
        position_ids[index] = torch.cat([torch.arange(documented) for documented in documents])
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
