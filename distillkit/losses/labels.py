"""Labels: which positions count, and what each of them predicts."""

import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

IGNORED_LABEL = -100
"""The label of a token that no loss counts, as everywhere in PyTorch and transformers."""


def shifted_labels(labels: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """What each position predicts: the next position's label, and -100 (nothing) for the last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)


def counted_mask(labels: Int[Tensor, "batch tokens"]) -> Bool[Tensor, " batch_tokens"]:
    """For each position of the flattened batch, whether its next token counts; labels are not shifted."""
    return shifted_labels(labels).flatten() != IGNORED_LABEL


def counted_rows(labels: Int[Tensor, "batch tokens"]) -> Int[Tensor, " rows"]:
    """The positions of the flattened batch whose next token counts."""
    return counted_mask(labels).nonzero().squeeze(-1)
