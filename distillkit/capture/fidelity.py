"""How much of a teacher's word is left in what was stored of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from distillkit.distribution import DenseDistribution, SparseDistribution, at_least_float32
from distillkit.losses.divergences import over_vocabulary


@dataclass(frozen=True)
class Fidelity:
    """Means over tokens."""

    tokens: int
    top_k_mass: float
    """The teacher's probability of the tokens that are stored."""
    kl_uniform: float
    """KL(teacher ‖ stored), what the stored tokens leave of 1 spread evenly over the others."""
    kl_background: float | None
    """The same, spread as the background distribution says; None where there is none."""


class FidelityMeter:
    """Adds up tokens, a chunk at a time.

    Args:
        background: log-distribution over the vocabulary that the missing mass may follow.
    """

    def __init__(self, background: Float[Tensor, " vocab"] | None) -> None:
        self._background = background
        self._tokens = 0
        self._sums = torch.zeros(3, dtype=torch.float64)

    @torch.no_grad()
    def add(self, teacher: DenseDistribution, stored: SparseDistribution) -> None:
        """The teacher's distributions at some tokens, and what was stored of them."""
        logprobs = at_least_float32(teacher.logits).log_softmax(-1)
        mass = logprobs.gather(-1, stored.ids).exp().masked_fill(~stored.present, 0).sum(-1)
        flat = logprobs.new_zeros(logprobs.shape[-1])
        uniform = _divergence(logprobs, stored, flat)
        if self._background is None:
            background = torch.zeros_like(uniform)
        else:
            background = _divergence(logprobs, stored, self._background.to(logprobs))
        self._tokens += len(logprobs)
        self._sums += torch.stack([each.double().sum() for each in (mass, uniform, background)]).cpu()

    def result(self) -> Fidelity:
        """The means over all tokens so far."""
        mass, uniform, background = (self._sums / max(self._tokens, 1)).tolist()
        return Fidelity(self._tokens, mass, uniform, None if self._background is None else background)


def _divergence(
    log_p: Float[Tensor, "tokens vocab"], stored: SparseDistribution, background: Float[Tensor, " vocab"]
) -> Float[Tensor, " tokens"]:
    """KL(teacher ‖ stored) as the loss has it, with the stored distribution in the student's place."""
    log_q = over_vocabulary(replace(stored, background=background)).log_softmax(-1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)
