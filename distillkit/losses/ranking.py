"""Ranking losses: the student learns the order of the teacher's likeliest tokens, not their probabilities.

A preference pair is two tokens i, j among the teacher's k likeliest with p_i > p_j (a tie is no preference). The
published value of both losses is the mean over pairs, so each returns a sum over its pairs and their number per token.
That number depends on the teacher alone: `preference_pair_counts` computes it before the student runs, because a step
of several micro-batches divides by the pairs of the whole step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distillkit.distribution import DenseDistribution, Distribution, SparseDistribution, at_least_float32
from distillkit.losses.divergences import PerToken

# How many of a dense teacher's tokens are ranked without a `top_k`: memory grows with its square.
DENSE_TOP_K = 32


def hinge(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher: Distribution,
    labels: Int[Tensor, " tokens"],
    *,
    margin: float | None = None,
    top_k: int | None = None,
) -> PerToken:
    """Σ max(0, margin - (q_i - q_j)) over pairs, q the student's probabilities.

    Without a margin, that of each pair is the teacher's gap p_i - p_j.
    """
    best, preferred = _preferences(teacher, top_k)
    q = at_least_float32(student_logits).softmax(-1).gather(-1, best.ids)
    required = _gaps(best.logprobs.exp()) if margin is None else margin
    return _over_pairs(F.relu(required - _gaps(q)), preferred)


def logistic_ranking(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher: Distribution,
    labels: Int[Tensor, " tokens"],
    *,
    top_k: int | None = None,
) -> PerToken:
    """Σ log(1 + exp(-(z_i - z_j))) over pairs, z the student's logits (RankNet, Burges et al. 2005, eq. 3)."""
    best, preferred = _preferences(teacher, top_k)
    z = at_least_float32(student_logits).gather(-1, best.ids)
    return _over_pairs(F.softplus(-_gaps(z)), preferred)


def preference_pair_counts(teacher: Distribution, top_k: int | None = None) -> Float[Tensor, " tokens"]:
    """The number of preference pairs of each token: the counts that both ranking losses return."""
    best, preferred = _preferences(teacher, top_k)
    return preferred.sum((-2, -1)).to(best.logprobs.dtype)


def _preferences(teacher: Distribution, top_k: int | None) -> tuple[SparseDistribution, Bool[Tensor, "tokens k k"]]:
    if isinstance(teacher, DenseDistribution):
        best = teacher.top_k(top_k or DENSE_TOP_K)
    else:
        best = teacher if top_k is None else teacher.top_k(top_k)
    best = SparseDistribution(best.ids, at_least_float32(best.logprobs))
    preferred = best.logprobs[:, :, None] > best.logprobs[:, None, :]
    return best, preferred & best.present[:, None, :]


def _gaps(values: Float[Tensor, "tokens k"]) -> Float[Tensor, "tokens k k"]:
    return values[:, :, None] - values[:, None, :]


def _over_pairs(losses: Float[Tensor, "tokens k k"], preferred: Bool[Tensor, "tokens k k"]) -> PerToken:
    return torch.where(preferred, losses, 0).sum((-2, -1)), preferred.sum((-2, -1)).to(losses.dtype)
