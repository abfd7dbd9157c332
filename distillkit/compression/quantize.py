"""Residual bins: what the curve misses, as whole numbers of a few bits and one scale per token and bin.

A bin's step is its largest residual / 2^(bits-1). Numbers are stored from 0 upwards. With one bit the published encoder
stores 1 for residuals above half the step, and its decoder reads 1 and 0 as ±1; so it is done here.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def quantize(
    values: Float[Tensor, "tokens elements"], bits: int, scale_dtype: torch.dtype
) -> tuple[Float[Tensor, "tokens 1"], Int64[Tensor, "tokens elements"]]:
    """(step in its stored type, numbers), each element rounded by itself."""
    step = _step(values, bits, scale_dtype)
    return step, _stored(_rounded(values / step.to(values.dtype), bits), bits)


def quantize_diffusing(
    values: Float[Tensor, "tokens elements"],
    bits: int,
    scale_dtype: torch.dtype,
    carried: Float[Tensor, " tokens"] | None,
) -> tuple[Float[Tensor, "tokens 1"], Int64[Tensor, "tokens elements"], Float[Tensor, " tokens"]]:
    """(step, numbers, error carried on): the rounding error of each element is added to the next.

    `carried` is in units of a step, also from one bin into the next, as in the published encoder.
    """
    step = _step(values, bits, scale_dtype)
    columns = (values / step.to(values.dtype)).T.contiguous()
    error = torch.zeros_like(columns[0]) if carried is None else carried
    for column in columns:
        wanted = column + error
        column.copy_(_rounded(wanted, bits))
        error = wanted - column
    return step, _stored(columns.T, bits), error


def dequantize(
    numbers: Int64[Tensor, "tokens elements"], step: Float[Tensor, "tokens 1"], bits: int
) -> Float[Tensor, "tokens elements"]:
    """What is added to the curve; float32, or float64 where the step is."""
    if bits == 1:
        return (numbers.float() * 2 - 1) * step
    return (numbers + _lowest(bits)).float() * step


def _step(values: Tensor, bits: int, scale_dtype: torch.dtype) -> Float[Tensor, "tokens 1"]:
    """A bin of zeros has step 1. One that the type cannot hold becomes the nearest that it can, never 0."""
    largest = values.abs().amax(-1, keepdim=True)
    step = torch.where(largest == 0, 1, largest / 2 ** (bits - 1))
    smallest = max(_smallest(scale_dtype), _smallest(values.dtype))
    widest = torch.promote_types(values.dtype, scale_dtype)
    return step.to(widest).clamp(smallest, torch.finfo(scale_dtype).max).to(scale_dtype)


def _smallest(dtype: torch.dtype) -> float:
    limits = torch.finfo(dtype)
    return limits.smallest_normal * limits.eps


def _rounded(scaled: Tensor, bits: int) -> Tensor:
    if bits == 1:
        return scaled.round().clamp(0, 1)
    return scaled.round().clamp(_lowest(bits), _highest(bits, scaled.dtype))


def _stored(rounded: Tensor, bits: int) -> Int64[Tensor, "tokens elements"]:
    return rounded.long() - _lowest(bits)


def _lowest(bits: int) -> int:
    return 0 if bits == 1 else -(2 ** (bits - 1))


def _highest(bits: int, dtype: torch.dtype) -> int:
    """2^(bits-1) - 1, or the next number below it that the floating point type has."""
    digits = 53 if dtype == torch.float64 else 24
    return 2 ** (bits - 1) - 2 ** max(bits - 1 - digits, 0)
