"""`logprob_compressor`: exact head, a curve for the rest, quantised residuals, packed ids.

A token's log-probabilities are sorted and stored as bytes, floating point numbers with their lowest byte first:

    exact_k values in exact_dtype
    the curve's coefficients in term_dtype
    per residual bin: its step in scale_dtype, its elements packed, most significant bit first

and its ids, in the same order, packed at ceil(log2 d) bits. With `delta_encoding` a row's values are, from the second
on, differences to the value before.

What is read is what is stored: a curve may lie above what it approximates, so the probabilities of a row may sum to
more than 1. Whoever uses them as a distribution normalises such a row, as the losses do.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from distillkit.compression.bits import pack_bytes, packed_bytes, unpack_bytes
from distillkit.compression.polynomial import curve_of
from distillkit.compression.quantize import dequantize, quantize, quantize_diffusing
from distillkit.compression.rows import (
    DTYPES,
    LEAST_LOGPROB,
    Columns,
    absent_filled,
    decode_in_chunks,
    encode_in_chunks,
    id_bits,
)
from distillkit.config.compression import LogprobCompressorConfig
from distillkit.distribution import SparseDistribution


class LogprobCompressor:
    """Codec of the published format.

    An absent entry (log-probability -inf) among the exact ones stays absent, and under `delta_encoding` so do all
    behind it. Elsewhere the format has no word for it: such entries of a row are stored as 1e-6 of probability
    together, which the curve follows as far as it can.
    """

    kind = "logprob_compressor"
    columns = ("bytepacked_indices", "compressed_logprobs")

    def __init__(self, config: LogprobCompressorConfig) -> None:
        self.config = config
        self.k = config.k
        self.vocabulary_size = config.d
        self._id_bits = id_bits(config.d)
        self._exact_dtype = DTYPES[config.exact_dtype]
        self._term_dtype = DTYPES[config.term_dtype]
        self._approximated = config.k - config.exact_k
        terms = config.polynomial_terms
        self._curve = (
            curve_of(terms, self._approximated, self._term_dtype, normalize_t=config.normalize_t) if terms else None
        )
        self._shapes = {
            "bytepacked_indices": (packed_bytes(config.k, self._id_bits), torch.uint8),
            "compressed_logprobs": (self._logprob_bytes(), torch.uint8),
        }
        wide = torch.float64 in (self._exact_dtype, self._term_dtype)
        self._decoded_dtype = torch.float64 if wide else torch.float32
        self.bytes_per_token = sum(width for width, _ in self._shapes.values())

    def encode(self, distribution: SparseDistribution) -> Columns:
        """Columns of bytes [tokens, width]. Raises UserError where the teacher's rows do not fit the configuration."""
        return encode_in_chunks(distribution, self.k, self.vocabulary_size, self._shapes, self._encode)

    def decode(self, columns: Mapping[str, Tensor]) -> SparseDistribution:
        """What the bytes say, on their device; float64 where exact values or coefficients are, else float32."""
        return decode_in_chunks(columns, self.k, self._decoded_dtype, self._shapes, self._decode)

    def _logprob_bytes(self) -> int:
        config = self.config
        size = config.exact_k * self._exact_dtype.itemsize
        size += len(config.polynomial_terms or ()) * self._term_dtype.itemsize
        for each in config.residual_bins:
            size += DTYPES[each.scale_dtype].itemsize + packed_bytes(each.num_elements, each.element_bits)
        return size

    def _encode(self, ids: Int[Tensor, "tokens k"], logprobs: Float[Tensor, "tokens k"]) -> Columns:
        exact_k = self.config.exact_k
        values = absent_filled(logprobs, exact_k)
        if self.config.delta_encoding:
            values = _differences(values)
        parts = []
        if exact_k:
            parts.append(_as_bytes(values[:, :exact_k].to(self._exact_dtype)))
        residual = values[:, exact_k:]
        if self._curve is not None:
            coefficients = self._curve.fit(residual)
            parts.append(_as_bytes(coefficients))
            if self.config.residual_bins:
                residual = self._curve.residual(residual, coefficients)
        parts.extend(self._encode_bins(residual))
        return {
            "bytepacked_indices": pack_bytes(ids, self._id_bits),
            "compressed_logprobs": torch.cat(parts, dim=-1),
        }

    def _encode_bins(self, residual: Float[Tensor, "tokens approximated"]) -> list[UInt8[Tensor, "tokens bytes"]]:
        parts: list[Tensor] = []
        carried, start = None, 0
        for each in self.config.residual_bins:
            values = residual[:, start : start + each.num_elements]
            scale_dtype = DTYPES[each.scale_dtype]
            if self.config.error_diffusion:
                step, numbers, carried = quantize_diffusing(values, each.element_bits, scale_dtype, carried)
            else:
                step, numbers = quantize(values, each.element_bits, scale_dtype)
            parts += [_as_bytes(step), pack_bytes(numbers, each.element_bits)]
            start += each.num_elements
        return parts

    def _decode(self, columns: Columns) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
        config = self.config
        reader = _Reader(columns["compressed_logprobs"])
        exact = reader.floats(config.exact_k, self._exact_dtype)
        logprobs = torch.empty(len(exact), self.k, dtype=self._decoded_dtype, device=exact.device)
        logprobs[:, : config.exact_k] = exact
        approximated = logprobs[:, config.exact_k :]
        if self._curve is None:
            approximated.zero_()
        else:
            approximated.copy_(self._curve.evaluate(reader.floats(len(self._curve), self._term_dtype)))
        start = 0
        for each in config.residual_bins:
            step = reader.floats(1, DTYPES[each.scale_dtype])
            packed = reader.bytes(packed_bytes(each.num_elements, each.element_bits))
            numbers = unpack_bytes(packed, each.element_bits, each.num_elements)
            # The published decoder has residuals in the type of the exact values.
            residual = dequantize(numbers, step, each.element_bits).to(self._exact_dtype)
            approximated[:, start : start + each.num_elements] += residual
            start += each.num_elements
        if config.delta_encoding:
            logprobs = logprobs.cumsum(-1)
        return unpack_bytes(columns["bytepacked_indices"], self._id_bits, self.k), logprobs


class _Reader:
    """Takes a row's bytes off one after the other."""

    def __init__(self, stored: UInt8[Tensor, "tokens bytes"]) -> None:
        self._stored = stored
        self._position = 0

    def bytes(self, count: int) -> UInt8[Tensor, "tokens count"]:
        start, self._position = self._position, self._position + count
        return self._stored[:, start : self._position]

    def floats(self, count: int, dtype: torch.dtype) -> Float[Tensor, "tokens count"]:
        # A copy, as bytes in the midst of a row need not begin where such a number may.
        packed = self.bytes(count * dtype.itemsize).clone(memory_format=torch.contiguous_format)
        return packed.view(dtype) if packed.numel() else packed.new_empty(len(packed), count, dtype=dtype)


def _as_bytes(values: Float[Tensor, "tokens n"]) -> UInt8[Tensor, "tokens bytes"]:
    return values.contiguous().view(torch.uint8)


def _differences(logprobs: Float[Tensor, "tokens k"]) -> Float[Tensor, "tokens k"]:
    """To the value before. Where values end in absent ones, the first difference is -inf and all after it are 0."""
    differences = torch.cat([logprobs[:, :1], logprobs[:, 1:] - logprobs[:, :-1]], dim=-1)
    absent = logprobs < LEAST_LOGPROB
    if not absent.any():
        return differences
    after_absent = torch.cat([torch.zeros_like(absent[:, :1]), absent[:, :-1]], dim=-1)
    return differences.masked_fill(absent, -torch.inf).masked_fill(after_absent, 0)
