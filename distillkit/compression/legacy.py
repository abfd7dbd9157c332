"""`legacy_logit_compression`: float16 head, a polynomial for the rest, ids in int64 words.

t runs from 1 to k - exact_k. The polynomial's terms are powers of t, or of 1/t with `invert_polynomial`, and then √t.
Published datasets in this format hold logits minus their mean, where ours hold log-probabilities. Their rows sum to far
more than 1, so they have to be normalised, as losses do with `missing_probability_handling: zero`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distillkit.compression.bits import pack_words, packed_words, unpack_words
from distillkit.compression.codec import Codec, Columns
from distillkit.compression.polynomial import Curve
from distillkit.compression.rows import DTYPES, absent_filled, id_bits
from distillkit.config.compression import LegacyLogitCompressionConfig


class LegacyLogitCompressor(Codec):
    """Codec of the older published format. Absent entries are stored as `LogprobCompressor` stores them.

    Coefficients of type bfloat16 are stored as float32, because parquet has no bfloat16. Decoded log-probabilities are
    float64 where the coefficients are, else float32.
    """

    kind = "legacy_logit_compression"
    columns = ("packed_indices", "exact_values", "coeffs")

    config: LegacyLogitCompressionConfig

    def __init__(self, config: LegacyLogitCompressionConfig) -> None:
        self._id_bits = id_bits(config.vocab_size)
        self._term_dtype = DTYPES[config.term_dtype]
        self._curve = _curve(config, self._term_dtype) if config.exact_k < config.k else None
        stored_terms = torch.float32 if self._term_dtype == torch.bfloat16 else self._term_dtype
        stored = {
            "packed_indices": (packed_words(config.k, self._id_bits), torch.int64),
            "exact_values": (config.exact_k, torch.float16),
            "coeffs": (0 if self._curve is None else len(self._curve), stored_terms),
        }
        super().__init__(
            config, config.k, config.vocab_size, stored, torch.promote_types(self._term_dtype, torch.float32)
        )

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
