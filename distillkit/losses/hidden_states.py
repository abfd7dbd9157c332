"""Losses between hidden states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distillkit.distribution import at_least_float32
from distillkit.losses.divergences import PerToken


def hs_mse(student_hidden: Float[Tensor, "tokens width"], teacher_hidden: Float[Tensor, "tokens width"]) -> PerToken:
    """Mean over the width of the squared difference, one per token."""
    difference = at_least_float32(student_hidden) - at_least_float32(teacher_hidden)
    sums = difference.square().mean(-1)
    return sums, torch.ones_like(sums)


def hs_cosine(student_hidden: Float[Tensor, "tokens width"], teacher_hidden: Float[Tensor, "tokens width"]) -> PerToken:
    """1 - cosine similarity, one per token; between 0 and 2."""
    sums = 1 - F.cosine_similarity(at_least_float32(student_hidden), at_least_float32(teacher_hidden), dim=-1)
    return sums, torch.ones_like(sums)
