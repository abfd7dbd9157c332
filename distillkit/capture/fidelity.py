"""How much of a teacher's word is left in what was stored of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from distillkit.distribution import DenseDistribution, SparseDistribution, at_least_float32


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
        uniform = _relative_entropy(logprobs, over_vocabulary(stored, flat))
        if self._background is None:
            background = torch.zeros_like(uniform)
        else:
            background = _relative_entropy(logprobs, over_vocabulary(stored, self._background.to(logprobs)))
        self._tokens += len(logprobs)
        self._sums += torch.stack([each.double().sum() for each in (mass, uniform, background)]).cpu()

    def result(self) -> Fidelity:
        """The means over all tokens so far."""
        mass, uniform, background = (self._sums / max(self._tokens, 1)).tolist()
        return Fidelity(self._tokens, mass, uniform, None if self._background is None else background)


def over_vocabulary(stored: SparseDistribution, background: Float[Tensor, " vocab"]) -> Float[Tensor, "tokens vocab"]:
    """Log-probabilities of all tokens: the stored ones, and the others share what is left as `background` has it.

    Stored log-probabilities are rounded, so they may leave nothing, or less, to tokens that the teacher finds
    possible; those get a float32 epsilon, and the whole is normalised.
    """
    logprobs = at_least_float32(stored.logprobs).masked_fill(~stored.present, -torch.inf)
    vocabulary_size = background.shape[0]
    ids = stored.ids.where(stored.present, vocabulary_size)  # an absent entry gets a column that is dropped
    others = torch.nn.functional.pad(background, (0, 1)).repeat(len(ids), 1).scatter_(-1, ids, -torch.inf)
    others = others[:, :vocabulary_size]
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(torch.float32).eps)
    others = rest.log() + others - others.logsumexp(-1, keepdim=True)
    others = torch.nn.functional.pad(others.nan_to_num(nan=-torch.inf), (0, 1))  # nan: there are no others
    return others.scatter_(-1, ids, logprobs)[:, :vocabulary_size].log_softmax(-1)


def _relative_entropy(
    log_p: Float[Tensor, "tokens vocab"], log_q: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, " tokens"]:
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)
