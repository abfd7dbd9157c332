"""What a capture asks of whatever runs the teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from distillkit.distribution import SparseDistribution

Row = Mapping[str, Any]
"""As `distillkit.data.build_dataset` makes them: `input_ids`, and `seq_lengths` of the documents that they are of."""


@dataclass(frozen=True)
class Answer:
    """The teacher's word on some of the rows that it was asked about."""

    rows: list[int]
    """Their places among the rows asked about."""
    distribution: SparseDistribution
    """All tokens of the first of these rows, then those of the second, and so on: as many as they have `input_ids`.

    An entry is the teacher's word on the token that follows; the last token of each document has one too. On the
    device where the teacher ran, in order of falling log-probability.
    """


class Engine(Protocol):
    """Whoever runs a teacher. `TransformersEngine` and `VLLMEngine` are the two there are."""

    vocabulary_size: int
    """Columns of the teacher's head, which may be more than its tokenizer has tokens."""
    device: torch.device
    """Where its answers are."""

    def top_k(self, rows: Sequence[Row], k: int, outside: Float[Tensor, " vocab"] | None = None) -> Iterator[Answer]:
        """The k likeliest tokens after each token, with log-probabilities over the whole vocabulary.

        Documents of a row do not see each other. Each row is in exactly one answer; which rows an answer holds, and
        what it says, depends on the rows asked about alone, so that a shard made again is the same shard.

        outside: the probabilities of all tokens outside the top k, summed over all positions, are added to it. Raises
            ValueError where the engine does not know them.
        """
        ...
