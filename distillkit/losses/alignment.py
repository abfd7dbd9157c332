"""Losses between attention outputs, each layer by itself: attention alignment (RADLADS step 1, arXiv 2505.03005).

The student's attention of a layer gets the inputs of the teacher's attention of that layer, and their outputs are
compared. No layer's output is the input of another, so the gradient of a layer is computed at once, in the forward
pass; only the gradient of its parameters is kept, and the backward pass scales it. So the memory is that of one layer's
activations, whatever the depth, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distillkit.losses.functions import masked_totals
from distillkit.losses.vocabulary_head import LossTerm


@dataclass(frozen=True)
class AlignedLayer:
    """One layer's attention on the inputs of the teacher's; `target` is the output of the teacher's."""

    attend: Callable[[], Float[Tensor, "batch tokens width"]]
    parameters: Sequence[nn.Parameter]
    """The trained parameters of `attend`."""
    target: Float[Tensor, "batch tokens width"]


def aligned_losses(
    layers: Sequence[AlignedLayer],
    counted: Bool[Tensor, " batch_tokens"],
    terms: Sequence[LossTerm],
    normalizer: float | Tensor,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """(loss, sums): sums are those of each term over the counted tokens, averaged over the layers.

    loss = Σ_terms weight · sum / normalizer. It is differentiable once, with respect to the layers' parameters; under
    torch.no_grad() no gradient is computed. A normalizer below 1 is taken as 1.
    """
    wanted = torch.is_grad_enabled()
    results = [_AlignedLayer.apply(_Work(layer, counted, terms, wanted), *layer.parameters) for layer in layers]
    losses, sums = (torch.stack(each) for each in zip(*results, strict=True))
    # Divided here and not within a layer, whose gradient would then be too small for float16.
    loss = losses.mean() / torch.as_tensor(normalizer, device=losses.device).clamp(min=1)
    return loss, {term.name: total for term, total in zip(terms, sums.mean(0).unbind(), strict=True)}


@dataclass(frozen=True)
class _Work:
    layer: AlignedLayer
    counted: Tensor
    terms: Sequence[LossTerm]
    wants_gradient: bool


class _AlignedLayer(torch.autograd.Function):
    """Σ_terms weight · sum of one layer, and the sums."""

    @staticmethod
    def forward(ctx: Any, work: _Work, *parameters: nn.Parameter) -> Any:
        with torch.set_grad_enabled(work.wants_gradient):
            output = work.layer.attend()
            with torch.autocast(output.device.type, enabled=False):
                sums = [_sum(term, output, work) for term in work.terms]
                loss = torch.stack([term.weight * total for term, total in zip(work.terms, sums, strict=True)]).sum()
                if work.wants_gradient:
                    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
                    ctx.save_for_backward(*gradients)
        totals = torch.stack(sums).detach()
        ctx.mark_non_differentiable(totals)
        return loss.detach(), totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, *_: Any) -> Any:
        return None, *(gradient * loss_gradient for gradient in ctx.saved_tensors)


def _sum(term: LossTerm, output: Float[Tensor, "batch tokens width"], work: _Work) -> Float[Tensor, ""]:
    sums, counts = term.function(output.flatten(0, 1), work.layer.target.flatten(0, 1))
    return masked_totals(sums, counts, work.counted)[0]
