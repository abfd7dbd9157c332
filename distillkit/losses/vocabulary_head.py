"""Distribution losses straight from hidden states and head weights, a chunk of tokens at a time.

The logits of a long sequence do not fit: at 128k columns and 32k tokens one float32 copy is 16.8 GB. Here the logits of
student and teacher are computed for one chunk, all losses are computed from them, and their gradient at once, in the
forward pass; only the gradient of the hidden states and of the head (in float32) is kept. The backward pass scales
these. So the memory is that of one chunk, whatever the number of tokens.

Like F.linear, the matmuls run in the dtype of the inputs, or in autocast's; the losses run in float32 (float64 stays).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from distillkit.distribution import Distribution, at_least_float32
from distillkit.losses.divergences import LossFunction, cross_entropy
from distillkit.losses.functions import masked_totals
from distillkit.models.chunked_logits import ChunkedHead, padded
from distillkit.models.labels import IGNORED_LABEL

TeacherChunks = Callable[[slice], Distribution]
TermTotals = Callable[..., Tensor]
"""`term_totals`, also compiled."""


@dataclass(frozen=True)
class LossTerm:
    """One loss of an objective: its name in results, its function, its share of the total, its options."""

    name: str
    function: LossFunction
    weight: float
    options: dict[str, Any] = field(default_factory=dict)


def chunked_vocabulary_losses(
    hidden_states: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocab width"],
    bias: Float[Tensor, " vocab"] | None,
    labels: Int[Tensor, " tokens"],
    teacher: TeacherChunks | None,
    terms: Sequence[LossTerm],
    normalizers: Mapping[str, float | Tensor],
    chunk_tokens: int,
    vocabulary_size: int | None = None,
    compiled_totals: TermTotals | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor], dict[str, Tensor]]:
    """(loss, sums, counts): loss = Σ_terms weight · (Σ_tokens sums) / normalizer, sums and counts per term's name.

    `loss` is differentiable once with respect to those of hidden_states, weight and bias that require a gradient;
    under torch.no_grad() no gradient is computed. Tokens labelled -100 do not count (leaving them out is cheaper).
    `teacher(rows)` returns the teacher distribution of a slice of the tokens; cross_entropy alone needs no teacher.
    A normalizer below 1 is taken as 1, so that a step in which nothing counts has loss 0.
    `vocabulary_size`: both distributions are conditioned on the first so many tokens, for models that share a
    tokenizer and pad its embeddings differently. Labels must be below it.
    `compiled_totals`: `term_totals` as torch.compile returns it. It computes all terms in one pass over the logits;
    uncompiled, the intermediate results of only one term exist at a time.
    """
    if not terms:
        return at_least_float32(hidden_states.new_zeros(())), {}, {}
    if vocabulary_size is not None and vocabulary_size < weight.shape[0]:
        weight = weight[:vocabulary_size]
        bias = None if bias is None else bias[:vocabulary_size]
    needs_teacher = any(term.function is not cross_entropy for term in terms)
    if needs_teacher and teacher is None:
        raise ValueError("a loss other than cross_entropy needs a teacher")
    loss_dtype = at_least_float32(weight.new_empty(0)).dtype
    scales = [
        term.weight / torch.as_tensor(normalizers[term.name], dtype=loss_dtype, device=weight.device).clamp(min=1)
        for term in terms
    ]
    wants = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden_states, weight, bias)]
    work = _Work(
        labels,
        teacher if needs_teacher else None,
        terms,
        scales,
        chunk_tokens,
        vocabulary_size,
        wants,
        loss_dtype,
        compiled_totals,
    )
    loss, sums, counts = _ChunkedHead.apply(hidden_states, weight, bias, work)
    names = [term.name for term in terms]
    return loss, dict(zip(names, sums.unbind(), strict=True)), dict(zip(names, counts.unbind(), strict=True))


@dataclass(frozen=True)
class _Work:
    labels: Tensor
    teacher: TeacherChunks | None
    terms: Sequence[LossTerm]
    scales: Sequence[Tensor]
    chunk_tokens: int
    vocabulary_size: int | None
    wants: Sequence[bool]  # gradients of hidden_states, weight, bias
    loss_dtype: torch.dtype
    compiled_totals: TermTotals | None


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, work: _Work) -> Any:
        loss, sums, counts, gradients = _run_chunks(hidden_states, weight, bias, work)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(sums, counts)
        return loss, sums, counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, *_: Any) -> Any:
        return *(None if g is None else g * loss_gradient.to(g.dtype) for g in ctx.saved_tensors), None


def _run_chunks(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, work: _Work
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    matmul_dtype = _matmul_dtype(hidden_states)
    head = ChunkedHead(weight, bias, matmul_dtype)
    hidden_gradient = torch.zeros_like(hidden_states) if work.wants[0] else None
    weight_gradient = torch.zeros_like(head.matrix, dtype=work.loss_dtype) if work.wants[1] else None
    bias_gradient = weight.new_zeros(head.columns, dtype=work.loss_dtype) if work.wants[2] else None
    totals = torch.zeros(2, len(work.terms), dtype=work.loss_dtype, device=weight.device)

    for start in range(0, len(hidden_states), work.chunk_tokens):
        rows = slice(start, min(start + work.chunk_tokens, len(hidden_states)))
        distribution = work.teacher(rows) if work.teacher is not None else None
        if distribution is not None and work.vocabulary_size is not None:
            distribution = distribution.first_columns(work.vocabulary_size)
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden = hidden_states[rows].to(matmul_dtype)
            logits = at_least_float32(head.logits(hidden))
            sums_and_counts, gradient = _chunk_losses(logits, distribution, work.labels[rows], work)
            totals += sums_and_counts
            if gradient is None:
                continue
            if bias_gradient is not None:
                bias_gradient += gradient.sum(0)
            gradient = padded(gradient.to(matmul_dtype), dim=1)
            if hidden_gradient is not None:
                hidden_gradient[rows] = (gradient @ head.matrix).to(hidden_gradient.dtype)
            if weight_gradient is not None:
                _add_product(weight_gradient, gradient.T, hidden)

    loss = sum((scale * total for scale, total in zip(work.scales, totals[0], strict=True)), totals.new_zeros(()))
    if weight_gradient is not None:
        weight_gradient = weight_gradient[: head.columns]
    return loss, totals[0], totals[1], [hidden_gradient, weight_gradient, bias_gradient]


def _chunk_losses(
    logits: Float[Tensor, "tokens vocab"], teacher: Distribution | None, labels: Int[Tensor, " tokens"], work: _Work
) -> tuple[Float[Tensor, "2 terms"], Float[Tensor, "tokens vocab"] | None]:
    """Every term's (sum, count) over one chunk, and the gradient of the weighted total."""
    gradient: Tensor | None = None
    totals = []
    together = len(work.terms) if work.compiled_totals is not None else 1
    for first in range(0, len(work.terms), together):
        group = slice(first, first + together)
        with torch.set_grad_enabled(any(work.wants)):
            leaf = logits.detach().requires_grad_(any(work.wants))
            sums_and_counts = (work.compiled_totals or term_totals)(leaf, teacher, labels, work.terms[group])
        if any(work.wants):
            scales = torch.stack([*work.scales[group]])
            (part,) = torch.autograd.grad(sums_and_counts, leaf, torch.stack([scales, torch.zeros_like(scales)]))
            gradient = part if gradient is None else gradient.add_(part)
        totals.append(sums_and_counts.detach())
    return torch.cat(totals, dim=1), gradient


def term_totals(
    logits: Float[Tensor, "tokens vocab"],
    teacher: Distribution | None,
    labels: Int[Tensor, " tokens"],
    terms: Sequence[LossTerm],
) -> Float[Tensor, "2 terms"]:
    """Each term's (sum, count) over the tokens that have a label."""
    mask = labels != IGNORED_LABEL
    totals = []
    for term in terms:
        sums, counts = term.function(logits, teacher, labels, **term.options)
        totals.append(torch.stack(masked_totals(sums, counts, mask)))
    return torch.stack(totals, dim=1)


def _matmul_dtype(hidden_states: Tensor) -> torch.dtype:
    device = hidden_states.device.type
    autocast = torch.is_autocast_enabled(device) and hidden_states.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else hidden_states.dtype


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
