"""Logits of a sequence, a chunk of tokens at a time: at 128k columns and 32k tokens one float32 copy is 16.8 GB."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LIVE_COPIES = 9
"""Float32 copies of a chunk's logits that are alive at the worst moment (kl with a dense teacher, measured)."""


class ChunkedHead:
    """A language-modelling head, its matrix cast and padded once.

    Args:
        weight: [vocab, width]. bias: [vocab] or None.
        dtype: of the matrix product.
    """

    def __init__(
        self, weight: Float[Tensor, "vocab width"], bias: Float[Tensor, " vocab"] | None, dtype: torch.dtype
    ) -> None:
        self.matrix = padded(weight.detach().to(dtype), dim=0)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.columns = len(weight)

    def logits(self, hidden_states: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens vocab"]:
        """In the dtype of the matrix product."""
        logits = F.linear(hidden_states.to(self.matrix.dtype), self.matrix)[:, : self.columns]
        return logits if self.bias is None else logits + self.bias


def chunk_tokens_within(memory_bytes: float, vocabulary_size: int) -> int:
    """The most tokens whose logits and what losses make of them stay within `memory_bytes`; at least 1."""
    return max(1, int(memory_bytes / (4 * LIVE_COPIES * vocabulary_size)))


def padded(tensor: Float[Tensor, "rows columns"], dim: int) -> Float[Tensor, "padded_rows padded_columns"]:
    """On CUDA a vocabulary that is no multiple of 64 (AFM-4.5B's 128005 is odd) slows the matmul several times."""
    missing = -tensor.shape[dim] % 64 if tensor.is_cuda else 0
    if missing == 0:
        return tensor
    return F.pad(tensor, (0, missing) if dim == 1 else (0, 0, 0, missing))
