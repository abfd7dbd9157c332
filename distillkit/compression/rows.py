"""Rows of log-probabilities before they are stored: sorted, cut to k, and finite where -inf cannot be stored."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

# A less likely token has probability 0 in float32: it is absent.
LEAST_LOGPROB = -104.0
# The probability of all absent entries of a row together, where a curve or a bin needs a finite value.
ABSENT_MASS = 1e-6

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def id_bits(vocabulary_size: int) -> int:
    """ceil(log2 vocabulary)."""
    return (vocabulary_size - 1).bit_length()


def likeliest(
    ids: Int[Tensor, "tokens n"], logprobs: Float[Tensor, "tokens n"], k: int
) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
    """The k likeliest, likeliest first; equal ones keep their order. Raises ValueError for NaN."""
    if not bool((logprobs[:, :-1] >= logprobs[:, 1:]).all()):
        if bool(logprobs.isnan().any()):
            raise ValueError("a log-probability is NaN")
        logprobs, order = logprobs.sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(-1, order)
    return ids[:, :k], logprobs[:, :k]


def absent_filled(logprobs: Float[Tensor, "tokens k"], first: int) -> Float[Tensor, "tokens k"]:
    """The same with finite values from column `first` on, where a -inf cannot be stored.

    All absent entries of a row get the same value, at most that of the least likely present one: together
    `ABSENT_MASS`.
    """
    absent = logprobs[:, first:] < LEAST_LOGPROB
    if not absent.any():
        return logprobs
    count = absent.sum(-1, keepdim=True).clamp(min=1).to(logprobs.dtype)
    least = logprobs.masked_fill(logprobs < LEAST_LOGPROB, 0).amin(-1, keepdim=True)
    filling = torch.minimum((ABSENT_MASS / count).log(), least)
    return torch.cat([logprobs[:, :first], torch.where(absent, filling, logprobs[:, first:])], dim=-1)
