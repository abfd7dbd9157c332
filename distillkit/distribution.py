"""What a teacher says about the next token: a whole row of logits, or its likeliest tokens alone.

Everything that gives a teacher's word (a live model, a captured dataset) ends in one of these two classes, and every
loss starts from one of them. Rows are tokens in both; a row never knows which sequence it came from.
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

    The log-probabilities are those of the whole vocabulary: what they leave of 1 is the mass of all other tokens.
    An entry of log-probability -inf is absent, so rows may say less than k tokens. `background` is a log-distribution
    over the vocabulary that the missing mass may be taken to follow (`missing_probability_handling: background`).
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
        # A lossy codec may give more than 1 in all; what is inside is at least what is listed there.
        inside_mass = torch.maximum(1 - outside_mass, mass.masked_fill(~inside, 0).sum(-1, keepdim=True))
        background = None if self.background is None else self.background[:vocabulary_size]
        return SparseDistribution(
            ids=self.ids.where(inside, 0),
            logprobs=(logprobs - inside_mass.log()).masked_fill(~inside, -torch.inf),
            background=background,
        )

    def top_k(self, k: int) -> SparseDistribution:
        """The k likeliest of the tokens that are there (all of them where there are fewer)."""
        logprobs, columns = self.logprobs.topk(min(k, self.logprobs.shape[-1]), dim=-1)
        return SparseDistribution(self.ids.gather(-1, columns), logprobs, self.background)


@dataclass(frozen=True)
class DenseDistribution:
    """The teacher's logits over the whole vocabulary, of any constant offset."""

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
