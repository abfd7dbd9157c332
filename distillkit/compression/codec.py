"""A codec: how the k likeliest tokens at each position are stored, and read back."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distillkit.compression.rows import likeliest
from distillkit.config.errors import UserError
from distillkit.config.section import Section
from distillkit.distribution import SparseDistribution, at_least_float32

Columns = dict[str, Tensor]
Column = tuple[int, torch.dtype]
"""Width and type of a column: [tokens, width]."""

# Tokens that are encoded or decoded at once: what is computed from them stays in the processor's cache.
CPU_TOKENS = 1024
# On a GPU as many as need some hundred MB.
GPU_TOKENS = 2**16


class Codec(ABC):
    """A way to store the k likeliest tokens of each position.

    Args:
        config: the section of the YAML.
        k: tokens that are stored per position.
        vocabulary_size: columns of the teacher's head.
        stored: the columns of the dataset, by name.
        decoded_dtype: of the log-probabilities that are read back.
    """

    kind: ClassVar[str]
    """The name of the section in the YAML."""
    columns: ClassVar[tuple[str, ...]]
    """Names of the dataset's columns."""

    def __init__(
        self, config: Section, k: int, vocabulary_size: int, stored: Mapping[str, Column], decoded_dtype: torch.dtype
    ) -> None:
        self.config = config
        self.k = k
        self.vocabulary_size = vocabulary_size
        self.bytes_per_token = sum(width * dtype.itemsize for width, dtype in stored.values())
        self._stored = stored
        self._decoded_dtype = decoded_dtype

    def encode(self, distribution: SparseDistribution) -> Columns:
        """Columns [*leading, width] of the types that are stored, from a distribution [*leading, at least k].

        Raises UserError for fewer than k tokens and for an id outside the vocabulary, ValueError for NaN.
        """
        ids, logprobs = distribution.ids, distribution.logprobs
        if ids.shape[-1] < self.k:
            given = ids.shape[-1]
            raise UserError(
                "k", f"{self.k} log-probabilities per token are to be stored, but the teacher gives {given}"
            )
        strange = ids[(ids < 0) | (ids >= self.vocabulary_size)]
        if len(strange):
            raise UserError(
                None, f"the teacher gives token {strange[0]}, but the vocabulary has {self.vocabulary_size} tokens"
            )
        leading = ids.shape[:-1]
        ids, logprobs = ids.flatten(0, -2), logprobs.flatten(0, -2)
        stored = {
            name: torch.empty(len(ids), width, dtype=dtype, device=ids.device)
            for name, (width, dtype) in self._stored.items()
        }
        for chunk in _chunks(len(ids), ids.device):
            columns = self._encode(*likeliest(ids[chunk], at_least_float32(logprobs[chunk]), self.k))
            for name, values in columns.items():
                stored[name][chunk] = values
        return {name: values.unflatten(0, leading) for name, values in stored.items()}

    def decode(self, columns: Mapping[str, Tensor]) -> SparseDistribution:
        """The stored distribution [*leading, k], likeliest token first, on the columns' device.

        Raises UserError where a column is missing or its rows are of another width than the configuration makes.
        """
        for name, (width, _) in self._stored.items():
            if name not in columns:
                raise UserError(None, f"the dataset has no column {name!r}; it was captured in another format")
            if columns[name].shape[-1] != width:
                raise UserError(
                    None,
                    f"the rows of column {name!r} hold {columns[name].shape[-1]} numbers, but this configuration makes "
                    f"{width}: give the one that the dataset was captured with",
                )
        first = columns[self.columns[0]]
        leading, device = first.shape[:-1], first.device
        flat = {name: columns[name].flatten(0, -2) for name in self._stored}
        tokens = leading.numel()
        ids = torch.empty(tokens, self.k, dtype=torch.int64, device=device)
        logprobs = torch.empty(tokens, self.k, dtype=self._decoded_dtype, device=device)
        for chunk in _chunks(tokens, device):
            ids[chunk], logprobs[chunk] = self._decode(
                {name: flat[name][chunk].to(dtype) for name, (_, dtype) in self._stored.items()}
            )
        return SparseDistribution(ids.unflatten(0, leading), logprobs.unflatten(0, leading))

    @abstractmethod
    def _encode(self, ids: Int[Tensor, "tokens k"], logprobs: Float[Tensor, "tokens k"]) -> Columns:
        """The columns of a chunk of tokens; log-probabilities fall along a row and are finite or -inf."""

    @abstractmethod
    def _decode(self, columns: Columns) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
        """Ids and log-probabilities of a chunk of tokens."""


def _chunks(tokens: int, device: torch.device) -> list[slice]:
    size = CPU_TOKENS if device.type == "cpu" else GPU_TOKENS
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
