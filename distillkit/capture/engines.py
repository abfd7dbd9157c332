"""The interface of whatever runs the teacher in a capture."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from distillkit.distribution import SparseDistribution

Row = Mapping[str, Any]
"""A row of `distillkit.data.build_dataset`: `input_ids`, and `seq_lengths` of its documents."""


@dataclass(frozen=True)
class TopKBatch:
    """The teacher's k likeliest next tokens at every position of some of the given rows."""

    rows: list[int]
    """Indices among the given rows."""
    distribution: SparseDistribution
    """[tokens, k]: all positions of the first of these rows, then those of the second, and so on.

    An entry is the distribution over the token after that position; the last position of a document has one too. It is
    on the device where the teacher ran, sorted by falling log-probability.
    """


class Engine(Protocol):
    """Runs a teacher. There are two engines, `TransformersEngine` and `VLLMEngine`."""

    vocabulary_size: int
    """Columns of the teacher's head, which may be more than the tokens of its tokenizer."""
    device: torch.device
    """Where distributions are returned."""

    def top_k(self, rows: Sequence[Row], k: int, outside: Float[Tensor, " vocab"] | None = None) -> Iterator[TopKBatch]:
        """The k likeliest tokens after each position, with log-probabilities over the whole vocabulary.

        Documents of a row do not attend to each other. Each row is in exactly one batch. Batches and distributions
        depend on the given rows alone, so that a shard that is made again has the same bytes.

        outside: the probabilities of all tokens outside the top k, summed over all positions, are added to it. Raises
            ValueError where the engine does not know them.
        """
        ...
