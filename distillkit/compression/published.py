"""`logprob_compressor`: exact head, a curve for the rest, quantised residuals, packed ids.

A token's log-probabilities are sorted and stored as bytes, floating point numbers with their lowest byte first:

    exact_k values in exact_dtype
    the curve's coefficients in term_dtype
    per residual bin: its step in scale_dtype, its elements packed, most significant bit first

and its ids, in the same order, packed at ceil(log2 d) bits. With `delta_encoding` a row's values are, from the second
on, differences to the value before.

A curve may lie above the values that it approximates, so the decoded probabilities of a row may sum to more than 1.
Such a row has to be normalised before it is used as a distribution, as the losses do.
"""

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from distillkit.compression.bits import pack_bytes, packed_bytes, unpack_bytes
from distillkit.compression.codec import Codec, Columns
from distillkit.compression.polynomial import curve_of
from distillkit.compression.quantize import dequantize, quantize, quantize_diffusing
from distillkit.compression.rows import DTYPES, LEAST_LOGPROB, absent_filled, id_bits
from distillkit.config.compression import LogprobCompressorConfig


class LogprobCompressor(Codec):
    """Codec of the published format.

    An absent entry (log-probability -inf) among the exact ones stays absent, and with `delta_encoding` so do all after
    it. Elsewhere the format cannot store an absent entry: those of a row are stored as a probability of 1e-6 together,
    which the curve follows as far as it can.

    Decoded log-probabilities are float64 where exact values or coefficients are, else float32.
    """

    kind = "logprob_compressor"
    columns = ("bytepacked_indices", "compressed_logprobs")

    config: LogprobCompressorConfig

    def __init__(self, config: LogprobCompressorConfig) -> None:
        self._id_bits = id_bits(config.d)
        self._exact_dtype = DTYPES[config.exact_dtype]
        self._term_dtype = DTYPES[config.term_dtype]
        points, terms = config.k - config.exact_k, config.polynomial_terms or ()
        self._curve = curve_of(terms, points, self._term_dtype, normalize_t=config.normalize_t) if terms else None
        logprob_bytes = config.exact_k * self._exact_dtype.itemsize + len(terms) * self._term_dtype.itemsize
        for each in config.residual_bins:
            logprob_bytes += DTYPES[each.scale_dtype].itemsize + packed_bytes(each.num_elements, each.element_bits)
        stored = {
            "bytepacked_indices": (packed_bytes(config.k, self._id_bits), torch.uint8),
            "compressed_logprobs": (logprob_bytes, torch.uint8),
        }
        wide = torch.float64 in (self._exact_dtype, self._term_dtype)
        super().__init__(config, config.k, config.d, stored, torch.float64 if wide else torch.float32)

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
    """Reads the bytes of all rows, from the first to the last."""

    def __init__(self, stored: UInt8[Tensor, "tokens bytes"]) -> None:
        self._stored = stored
        self._position = 0

    def bytes(self, count: int) -> UInt8[Tensor, "tokens count"]:
        start, self._position = self._position, self._position + count
        return self._stored[:, start : self._position]

    def floats(self, count: int, dtype: torch.dtype) -> Float[Tensor, "tokens count"]:
        # A copy, because bytes in the middle of a row need not be aligned for the type.
        packed = self.bytes(count * dtype.itemsize).clone(memory_format=torch.contiguous_format)
        return packed.view(dtype) if packed.numel() else packed.new_empty(len(packed), count, dtype=dtype)


def _as_bytes(values: Float[Tensor, "tokens n"]) -> UInt8[Tensor, "tokens bytes"]:
    return values.contiguous().view(torch.uint8)


def _differences(logprobs: Float[Tensor, "tokens k"]) -> Float[Tensor, "tokens k"]:
    """To the value before. Where a row ends in absent values, the first difference is -inf and all after it are 0."""
    differences = torch.cat([logprobs[:, :1], logprobs[:, 1:] - logprobs[:, :-1]], dim=-1)
    absent = logprobs < LEAST_LOGPROB
    if not absent.any():
        return differences
    after_absent = torch.cat([torch.zeros_like(absent[:, :1]), absent[:, :-1]], dim=-1)
    return differences.masked_fill(absent, -torch.inf).masked_fill(after_absent, 0)
