"""`legacy_logit_compression`: float16 head, a polynomial for the rest, ids in int64 words.

t runs from 1 to k - exact_k; the polynomial's terms are its powers, or with `invert_polynomial` those of 1/t, and √t
after them. Published datasets in this format hold logits less their mean where ours hold log-probabilities; their rows
sum to far more than 1 and mean something only normalised, which losses with `missing_probability_handling: zero` do.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distillkit.compression.bits import pack_words, packed_words, unpack_words
from distillkit.compression.polynomial import Curve
from distillkit.compression.rows import DTYPES, Columns, absent_filled, decode_in_chunks, encode_in_chunks, id_bits
from distillkit.config.compression import LegacyLogitCompressionConfig
from distillkit.distribution import SparseDistribution


class LegacyLogitCompressor:
    """Codec of the older published format. Absent entries are stored as `LogprobCompressor` stores them.

    Coefficients of type bfloat16 are given as float32, as parquet has no such type.
    """

    kind = "legacy_logit_compression"
    columns = ("packed_indices", "exact_values", "coeffs")

    def __init__(self, config: LegacyLogitCompressionConfig) -> None:
        self.config = config
        self.k = config.k
        self.vocabulary_size = config.vocab_size
        self._id_bits = id_bits(config.vocab_size)
        self._term_dtype = DTYPES[config.term_dtype]
        self._curve = _curve(config, self._term_dtype) if config.exact_k < config.k else None
        stored_terms = torch.float32 if self._term_dtype == torch.bfloat16 else self._term_dtype
        self._shapes = {
            "packed_indices": (packed_words(config.k, self._id_bits), torch.int64),
            "exact_values": (config.exact_k, torch.float16),
            "coeffs": (0 if self._curve is None else len(self._curve), stored_terms),
        }
        self._decoded_dtype = torch.promote_types(self._term_dtype, torch.float32)
        self.bytes_per_token = sum(width * dtype.itemsize for width, dtype in self._shapes.values())

    def encode(self, distribution: SparseDistribution) -> Columns:
        """Columns [tokens, width]. Raises UserError where the teacher's rows do not fit the configuration."""
        return encode_in_chunks(distribution, self.k, self.vocabulary_size, self._shapes, self._encode)

    def decode(self, columns: Mapping[str, Tensor]) -> SparseDistribution:
        """What the columns say, on their device; float64 where the coefficients are, else float32."""
        return decode_in_chunks(columns, self.k, self._decoded_dtype, self._shapes, self._decode)

    def _encode(self, ids: Int[Tensor, "tokens k"], logprobs: Float[Tensor, "tokens k"]) -> Columns:
        exact_k = self.config.exact_k
        columns = {
            "packed_indices": pack_words(ids, self._id_bits),
            "exact_values": logprobs[:, :exact_k].half(),
        }
        if self._curve is not None:
            columns["coeffs"] = self._curve.fit(absent_filled(logprobs, exact_k)[:, exact_k:])
        return columns

    def _decode(self, columns: Columns) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
        logprobs = columns["exact_values"].to(self._decoded_dtype)
        if self._curve is not None:
            logprobs = torch.cat([logprobs, self._curve.evaluate(columns["coeffs"].to(self._term_dtype))], dim=-1)
        return unpack_words(columns["packed_indices"], self._id_bits, self.k), logprobs


def _curve(config: LegacyLogitCompressionConfig, dtype: torch.dtype) -> Curve:
    def values(dtype: torch.dtype) -> Tensor:
        t = torch.arange(1, config.k - config.exact_k + 1, dtype=dtype)
        sign = -1 if config.invert_polynomial else 1
        rows = [t ** (sign * power) for power in range(config.polynomial_degree + 1)]
        return torch.stack([*rows, t.sqrt()] if config.with_sqrt_term else rows)

    # Terms are rounded to the stored type; the products are of at least float32.
    working = torch.promote_types(dtype, torch.float32)
    return Curve(values, dtype, values(working).to(dtype).to(working))
