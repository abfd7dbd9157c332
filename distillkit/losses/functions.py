"""The losses by their names in `loss_functions[i].function`, and how their results are added up."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distillkit.losses.divergences import LossFunction, cross_entropy, jsd, kl, reverse_kl, tvd
from distillkit.losses.hidden_states import hs_cosine, hs_mse
from distillkit.losses.ranking import hinge, logistic_ranking

DISTRIBUTION_LOSSES: dict[str, LossFunction] = {
    "cross_entropy": cross_entropy,
    "kl": kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "tvd": tvd,
    "hinge": hinge,
    "logistic_ranking": logistic_ranking,
}
RANKING_LOSSES = ("hinge", "logistic_ranking")
HIDDEN_STATE_LOSSES: dict[str, LossFunction] = {"hs_mse": hs_mse, "hs_cosine": hs_cosine}
ATTENTION_LOSSES: dict[str, LossFunction] = {"attn_mse": hs_mse, "attn_cosine": hs_cosine}
LOSSES = DISTRIBUTION_LOSSES | HIDDEN_STATE_LOSSES | ATTENTION_LOSSES


def masked_totals(
    sums: Float[Tensor, " tokens"], counts: Float[Tensor, " tokens"], mask: Bool[Tensor, " tokens"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(Σ sums, Σ counts) over the tokens where mask is true."""
    return torch.where(mask, sums, 0).sum(), torch.where(mask, counts, 0).sum()


def reduce(
    sums: Float[Tensor, " tokens"], counts: Float[Tensor, " tokens"], mask: Bool[Tensor, " tokens"]
) -> Float[Tensor, ""]:
    """Σ sums / Σ counts over the tokens where mask is true: the published value of a loss; 0 where nothing counts."""
    total, count = masked_totals(sums, counts, mask.bool())
    return total / count.clamp(min=1)
