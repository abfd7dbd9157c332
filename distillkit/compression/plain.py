"""`plain`: the k likeliest tokens and their log-probabilities as they are, `token_ids` and `top_values`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distillkit.compression.rows import DTYPES, Columns, decode_in_chunks, encode_in_chunks
from distillkit.config.compression import PlainConfig
from distillkit.distribution import SparseDistribution


class Plain:
    """Codec that stores ids as int32 and log-probabilities as floating point numbers; -inf stays -inf."""

    kind = "plain"
    columns = ("token_ids", "top_values")

    def __init__(self, config: PlainConfig) -> None:
        self.config = config
        self.k = config.k
        self.vocabulary_size = config.vocab_size
        self._shapes = {"token_ids": (config.k, torch.int32), "top_values": (config.k, DTYPES[config.dtype])}
        self.bytes_per_token = sum(width * dtype.itemsize for width, dtype in self._shapes.values())

    def encode(self, distribution: SparseDistribution) -> Columns:
        """Columns [tokens, k]. Raises UserError where the teacher's rows do not fit the configuration."""
        return encode_in_chunks(
            distribution,
            self.k,
            self.vocabulary_size,
            self._shapes,
            lambda ids, logprobs: {"token_ids": ids, "top_values": logprobs},
        )

    def decode(self, columns: Mapping[str, Tensor]) -> SparseDistribution:
        """Ids and float32 log-probabilities, on the columns' device."""
        return decode_in_chunks(
            columns, self.k, torch.float32, self._shapes, lambda each: (each["token_ids"], each["top_values"])
        )
