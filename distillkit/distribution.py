"""Teacher distributions over the next token: logits of the whole vocabulary, or the likeliest tokens only.

Every teacher (a live model, a captured dataset) returns one of these two classes, and every loss takes one of them.
Rows are tokens in both; a row does not know which sequence it belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


def at_least_float32(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Losses are computed in float32, or in float64 where the input is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@dataclass(frozen=True)
class SparseDistribution:
    """The teacher's k likeliest tokens and their log-probabilities (natural log, at temperature 1).

    The log-probabilities are normalised over the whole vocabulary: 1 minus their probabilities is that of all other
    tokens. An entry of log-probability -inf is absent, so rows may have fewer than k tokens. `background` is a
    log-distribution over the vocabulary for the missing probability (`missing_probability_handling: background`).
    """

    ids: Int[Tensor, "tokens k"]
    logprobs: Float[Tensor, "tokens k"]
    background: Float[Tensor, " vocab"] | None = None

    @property
    def present(self) -> Tensor:
        return self.logprobs > -torch.inf

    def first_columns(self, vocabulary_size: int) -> SparseDistribution:
        """The same distribution given that the token is one of the first `vocabulary_size`."""
        inside = self.ids < vocabulary_size
        logprobs = at_least_float32(self.logprobs)
        mass = logprobs.exp()
        outside_mass = mass.masked_fill(inside, 0).sum(-1, keepdim=True)
        # A lossy codec may give more than 1 in total; the inside has at least the probability of its entries.
        inside_mass = torch.maximum(1 - outside_mass, mass.masked_fill(~inside, 0).sum(-1, keepdim=True))
        background = None if self.background is None else self.background[:vocabulary_size]
        return SparseDistribution(
            ids=self.ids.where(inside, 0),
            logprobs=(logprobs - inside_mass.log()).masked_fill(~inside, -torch.inf),
            background=background,
        )

    def top_k(self, k: int) -> SparseDistribution:
        """The k likeliest of the stored tokens (all of them where there are fewer)."""
        logprobs, columns = self.logprobs.topk(min(k, self.logprobs.shape[-1]), dim=-1)
        return SparseDistribution(self.ids.gather(-1, columns), logprobs, self.background)


@dataclass(frozen=True)
class DenseDistribution:
    """The teacher's logits over the whole vocabulary, with any constant offset."""

    logits: Float[Tensor, "tokens vocab"]

    def first_columns(self, vocabulary_size: int) -> DenseDistribution:
        """The same distribution given that the token is one of the first `vocabulary_size`."""
        return DenseDistribution(self.logits[:, :vocabulary_size])

    def top_k(self, k: int) -> SparseDistribution:
        """The k likeliest tokens, their log-probabilities normalised over the whole vocabulary."""
        logits = at_least_float32(self.logits)
        values, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
        return SparseDistribution(ids, values - logits.logsumexp(-1, keepdim=True))


Distribution = DenseDistribution | SparseDistribution
