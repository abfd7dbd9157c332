"""Divergences between the teacher's and the student's next-token distributions, and cross-entropy.

All of them are sums over columns of (log p, log q): p the teacher, q the student, both at the temperature.
`paired_logprobs` computes those columns for every kind of teacher, so that a divergence is only its formula:

- dense teacher: one column per token of the vocabulary;
- sparse teacher: one column for each of its k tokens, and a last one for all other tokens together. q is always the
  softmax over the whole vocabulary. The probability of the other tokens under p is `missing_probability_handling`:
    zero               none: the k probabilities are normalised to 1;
    symmetric_uniform  the mass that the k log-probabilities leave. Student and teacher spread theirs over the others
                       in the same shape, so only the two totals are compared. Under a temperature that mass is one
                       logit among k + 1, as in the published toolkit;
    background         the mass that they leave, in proportion to `SparseDistribution.background`; the result is a
                       dense distribution.

Losses are neither multiplied by temperature² nor averaged: each returns (sums, counts), one of each per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from distillkit.distribution import Distribution, SparseDistribution, at_least_float32
from distillkit.models.labels import IGNORED_LABEL

PerToken = tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]
LogProbs = Float[Tensor, "tokens columns"]

LossFunction = Callable[..., PerToken]
"""A loss: (student_logits, teacher, labels, **options) -> (sums, counts)."""

# The log-probability of what cannot happen: its exp is exactly 0, and unlike -inf it can be multiplied by that 0.
IMPOSSIBLE = -1e4


def cross_entropy(
    student_logits: Float[Tensor, "tokens vocab"], teacher: Distribution | None, labels: Int[Tensor, " tokens"]
) -> PerToken:
    """-log q(label). The teacher is not used. A label of -100 gives 0."""
    return _one_each(
        F.cross_entropy(at_least_float32(student_logits), labels, reduction="none", ignore_index=IGNORED_LABEL)
    )


def _divergence(formula: Callable[[LogProbs, LogProbs], Float[Tensor, " tokens"]]) -> LossFunction:
    """The loss from a formula over (log p, log q) of `paired_logprobs`."""

    def loss(
        student_logits: Float[Tensor, "tokens vocab"],
        teacher: Distribution,
        labels: Int[Tensor, " tokens"] | None,
        *,
        temperature: float = 1.0,
        missing_probability_handling: str = "zero",
    ) -> PerToken:
        return _one_each(formula(*paired_logprobs(student_logits, teacher, temperature, missing_probability_handling)))

    loss.__name__ = loss.__qualname__ = formula.__name__
    loss.__doc__ = formula.__doc__
    return loss


@_divergence
def kl(log_p: LogProbs, log_q: LogProbs) -> Float[Tensor, " tokens"]:
    """KL(p ‖ q) = Σ p (log p - log q), the forward direction of Hinton et al. 2015 (arXiv:1503.02531)."""
    return _relative_entropy(log_p, log_q)


@_divergence
def reverse_kl(log_p: LogProbs, log_q: LogProbs) -> Float[Tensor, " tokens"]:
    """KL(q ‖ p), mode-seeking (MiniLLM, arXiv:2306.08543).

    Where p is 0, KL(q ‖ p) is infinite, so q is conditioned on the tokens that p allows. With a sparse teacher and
    `zero`, the student's probability of the teacher's k tokens together is then unconstrained: combine it with
    `cross_entropy`, or choose `symmetric_uniform`.
    """
    log_q = log_q.masked_fill(log_p <= IMPOSSIBLE, IMPOSSIBLE).log_softmax(-1)
    return _relative_entropy(log_q, log_p)


@_divergence
def jsd(log_p: LogProbs, log_q: LogProbs) -> Float[Tensor, " tokens"]:
    """Jensen-Shannon divergence ½ KL(p ‖ m) + ½ KL(q ‖ m), m = ½ (p + q); between 0 and ln 2 (Lin 1991, eq. 4.1)."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (_relative_entropy(log_p, log_m) + _relative_entropy(log_q, log_m)) / 2


@_divergence
def tvd(log_p: LogProbs, log_q: LogProbs) -> Float[Tensor, " tokens"]:
    """Total variation distance ½ Σ |p - q|, between 0 and 1."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def paired_logprobs(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher: Distribution,
    temperature: float = 1.0,
    missing_probability_handling: str = "zero",
) -> tuple[LogProbs, LogProbs]:
    """(log p, log q) of teacher and student over the same columns, whose probabilities sum to 1 (see the module).

    Raises ValueError for vocabularies of different width, an unknown `missing_probability_handling`, and `background`
    without a background distribution.
    """
    log_q = (at_least_float32(student_logits) / temperature).log_softmax(-1)
    if isinstance(teacher, SparseDistribution):
        if missing_probability_handling == "background":
            log_p = (over_vocabulary(teacher) / temperature).log_softmax(-1)
        else:
            log_p = _with_rest(teacher, temperature, missing_probability_handling)
            log_q = _gathered_with_rest(log_q, teacher)
    else:
        log_p = (at_least_float32(teacher.logits) / temperature).log_softmax(-1)
    if log_p.shape != log_q.shape:
        raise ValueError(
            f"the teacher's vocabulary has {log_p.shape[-1]} columns, the student's {log_q.shape[-1]}: "
            "give the vocabulary_size that they share"
        )
    return log_p.nan_to_num(nan=torch.nan, neginf=IMPOSSIBLE), log_q


def _with_rest(
    teacher: SparseDistribution, temperature: float, missing_probability_handling: str
) -> Float[Tensor, "tokens k+1"]:
    logprobs = at_least_float32(teacher.logprobs)
    if missing_probability_handling == "zero":
        rest = torch.full_like(logprobs[:, :1], -torch.inf)
    elif missing_probability_handling == "symmetric_uniform":
        rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=0).log()
    else:
        raise ValueError(f"missing_probability_handling: {missing_probability_handling!r} is not known")
    log_p = (torch.cat([logprobs, rest], dim=-1) / temperature).log_softmax(-1)
    # A row without any probability, normalised, would be 0/0: it stays without any.
    return log_p.masked_fill(~teacher.present.any(-1, keepdim=True) & (rest == -torch.inf), IMPOSSIBLE)


def _gathered_with_rest(
    log_q: Float[Tensor, "tokens vocab"], teacher: SparseDistribution
) -> Float[Tensor, "tokens k+1"]:
    gathered = log_q.gather(-1, teacher.ids).masked_fill(~teacher.present, IMPOSSIBLE)
    rest = 1 - gathered.exp().sum(-1, keepdim=True)
    # The difference of two numbers near 1 has no precision below eps; there the gradient is 0 too.
    return torch.cat([gathered, rest.clamp(min=torch.finfo(rest.dtype).eps).log()], dim=-1)


def over_vocabulary(teacher: SparseDistribution) -> Float[Tensor, "tokens vocab"]:
    """Log-probabilities of all tokens: the k stored ones; the others share the rest in proportion to the background.

    Stored values are rounded and may leave no probability to the others, or a negative one; these then share the
    dtype's epsilon, so that a row may sum to more than 1: normalise it. Raises ValueError without a background.
    """
    if teacher.background is None:
        raise ValueError("missing_probability_handling: background needs a teacher with a background distribution")
    logprobs = at_least_float32(teacher.logprobs)
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(logprobs.dtype).eps).log()
    # An absent entry is put into a column of its own, which is then dropped.
    vocabulary_size = teacher.background.shape[0]
    ids = teacher.ids.where(teacher.present, vocabulary_size)
    others = F.pad(at_least_float32(teacher.background), (0, 1)).expand(len(ids), -1).scatter(-1, ids, -torch.inf)
    others = rest + others[:, :vocabulary_size].log_softmax(-1).nan_to_num(nan=-torch.inf)
    return F.pad(others, (0, 1)).scatter(-1, ids, logprobs)[:, :vocabulary_size]


def _relative_entropy(
    log_a: Float[Tensor, "tokens columns"], log_b: Float[Tensor, "tokens columns"]
) -> Float[Tensor, " tokens"]:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _one_each(sums: Float[Tensor, " tokens"]) -> PerToken:
    return sums, torch.ones_like(sums)
