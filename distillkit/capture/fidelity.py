"""How much of a teacher distribution is lost where only its likeliest tokens are stored, by a lossy codec."""

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
    """Probability that the teacher gives to the stored tokens."""
    kl_uniform: float
    """KL(teacher ‖ stored) in nats, the remaining probability spread uniformly over the tokens that are not stored."""
    kl_background: float | None
    """The same, with the remaining probability spread like the background distribution; None where there is none."""


class FidelityMeter:
    """Sums over tokens, a chunk at a time.

    Args:
        background: log-distribution over the vocabulary for the probability outside the stored tokens.
    """

    def __init__(self, background: Float[Tensor, " vocab"] | None) -> None:
        self._background = background
        self._tokens = 0
        self._sums = torch.zeros(3, dtype=torch.float64)

    @torch.no_grad()
    def add(self, teacher: DenseDistribution, stored: SparseDistribution) -> None:
        """Add some tokens: the teacher's distributions, and the stored ones."""
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
    """KL(teacher ‖ stored) as the loss computes it, with the stored distribution as the student's."""
    log_q = over_vocabulary(replace(stored, background=background)).log_softmax(-1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)
