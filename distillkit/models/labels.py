"""Which positions count, and what each of them predicts.

Rows of text have labels as everywhere in transformers: each token's own. Batches have targets: what each position
predicts, the next token's label. They are shifted once, when rows become batches.
"""

import torch
from jaxtyping import Int
from torch import Tensor

IGNORED_LABEL = -100
"""The label of a token that no loss counts, as everywhere in PyTorch and transformers."""


def shifted_labels(labels: Int[Tensor, "*batch tokens"]) -> Int[Tensor, "*batch tokens"]:
    """Targets: the next position's label, and -100 (nothing) for the last."""
    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED_LABEL)


def counted_rows(targets: Int[Tensor, "batch tokens"]) -> Int[Tensor, " rows"]:
    """The positions of the flattened batch that count."""
    return (targets.flatten() != IGNORED_LABEL).nonzero().squeeze(-1)
