"""What every codec does with rows before storing them and after reading them."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distillkit.config.errors import UserError
from distillkit.distribution import SparseDistribution, at_least_float32

Columns = dict[str, Tensor]
Shape = tuple[int, torch.dtype]

# Whatever is less likely has probability 0 in float32: it is absent.
LEAST_LOGPROB = -104.0
# What all absent entries of a row are given together where a curve or a bin has to say something of them.
ABSENT_MASS = 1e-6
# Tokens worked on at once: what is computed from them stays in the processor's cache.
CPU_TOKENS = 1024
# On a GPU as many as need some hundred MB.
GPU_TOKENS = 2**16

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def id_bits(vocabulary_size: int) -> int:
    """ceil(log2 vocabulary)."""
    return (vocabulary_size - 1).bit_length()


def encode_in_chunks(
    distribution: SparseDistribution,
    k: int,
    vocabulary_size: int,
    shapes: Mapping[str, Shape],
    encode: Callable[[Tensor, Tensor], Columns],
) -> Columns:
    """`encode` of (ids, log-probabilities), sorted, finite or -inf, k to a row, a chunk of tokens at a time.

    Raises UserError for a row of fewer than k entries and for an id outside the vocabulary, ValueError for NaN.
    """
    ids, logprobs = distribution.ids, distribution.logprobs
    if ids.shape[-1] < k:
        raise UserError("k", f"{k} log-probabilities per token are to be stored, but the teacher gives {ids.shape[-1]}")
    strange = ids[(ids < 0) | (ids >= vocabulary_size)]
    if len(strange):
        raise UserError(
            None, f"the teacher names token {strange[0]}, but its vocabulary is said to have {vocabulary_size}"
        )
    leading = ids.shape[:-1]
    ids, logprobs = ids.flatten(0, -2), logprobs.flatten(0, -2)
    stored = {
        name: torch.empty(len(ids), width, dtype=dtype, device=ids.device) for name, (width, dtype) in shapes.items()
    }
    for chunk in _chunks(len(ids), ids.device):
        columns = encode(*_sorted(ids[chunk], at_least_float32(logprobs[chunk]), k))
        for name, values in columns.items():
            stored[name][chunk] = values
    return {name: values.unflatten(0, leading) for name, values in stored.items()}


def decode_in_chunks(
    columns: Mapping[str, Tensor],
    k: int,
    dtype: torch.dtype,
    shapes: Mapping[str, Shape],
    decode: Callable[[Columns], tuple[Tensor, Tensor]],
) -> SparseDistribution:
    """The distributions that `decode` makes of a chunk of tokens at a time, log-probabilities in `dtype`.

    Raises UserError where a column is missing or its rows are of another width than the configuration makes.
    """
    for name, (width, _) in shapes.items():
        if name not in columns:
            raise UserError(None, f"the dataset has no column {name!r}; it was captured in another format")
        if columns[name].shape[-1] != width:
            raise UserError(
                None,
                f"the rows of column {name!r} hold {columns[name].shape[-1]} numbers, but this configuration makes "
                f"{width}: give the one that the dataset was captured with",
            )
    first = columns[next(iter(shapes))]
    leading, device = first.shape[:-1], first.device
    flat = {name: columns[name].flatten(0, -2) for name in shapes}
    tokens = leading.numel()
    ids = torch.empty(tokens, k, dtype=torch.int64, device=device)
    logprobs = torch.empty(tokens, k, dtype=dtype, device=device)
    for chunk in _chunks(tokens, device):
        ids[chunk], logprobs[chunk] = decode(
            {name: flat[name][chunk].to(stored_dtype) for name, (_, stored_dtype) in shapes.items()}
        )
    return SparseDistribution(ids.unflatten(0, leading), logprobs.unflatten(0, leading))


def absent_filled(logprobs: Float[Tensor, "tokens k"], first: int) -> Float[Tensor, "tokens k"]:
    """The same with something finite from column `first` on, where a -inf cannot be stored.

    All absent entries of a row get the same, not more than the least likely present one: together `ABSENT_MASS`.
    """
    absent = logprobs[:, first:] < LEAST_LOGPROB
    if not absent.any():
        return logprobs
    count = absent.sum(-1, keepdim=True).clamp(min=1).to(logprobs.dtype)
    least = logprobs.masked_fill(logprobs < LEAST_LOGPROB, 0).amin(-1, keepdim=True)
    filling = torch.minimum((ABSENT_MASS / count).log(), least)
    return torch.cat([logprobs[:, :first], torch.where(absent, filling, logprobs[:, first:])], dim=-1)


def _chunks(tokens: int, device: torch.device) -> list[slice]:
    size = CPU_TOKENS if device.type == "cpu" else GPU_TOKENS
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _sorted(
    ids: Int[Tensor, "tokens n"], logprobs: Float[Tensor, "tokens n"], k: int
) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
    """The k likeliest, likeliest first; of equal ones the order stays."""
    if not bool((logprobs[:, :-1] >= logprobs[:, 1:]).all()):
        if bool(logprobs.isnan().any()):
            raise ValueError("a log-probability is NaN")
        logprobs, order = logprobs.sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(-1, order)
    return ids[:, :k], logprobs[:, :k]
