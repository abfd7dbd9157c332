"""A causal language model in its two parts: a decoder that makes hidden states, and a head that makes logits of them.

Logits of a whole sequence are too large to hold, so nothing in this package calls a model for its logits; the two
parts are called here, the head elsewhere and a chunk of tokens at a time. `check_head` makes sure that a model is in
fact the sum of these parts.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from distillkit.config.errors import UserError
from distillkit.models.divided_rows import DIVIDED, divided_rows
from distillkit.models.finite import HALF, is_finite
from distillkit.models.hidden_states import HiddenStateTaps
from distillkit.models.recorder import Call, recorded
from distillkit.models.varlen_attention import VARLEN, document_boundaries


def decode(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch tokens"],
    position_ids: Int[Tensor, "batch tokens"],
    layers: Iterable[int] = (),
    *,
    final_norm: bool = True,
) -> tuple[Float[Tensor, "batch tokens width"], dict[int, Float[Tensor, "batch tokens width"]]]:
    """The final hidden states, and those of `layers` (`HiddenStateTaps` says what the indices mean).

    Documents end where `position_ids` start again; none sees another. No attention mask is needed.
    """
    batch, tokens = input_ids.shape
    decoder, wanted = model.get_decoder(), list(layers)
    with HiddenStateTaps(decoder, wanted, final_norm=final_norm) if wanted else nullcontext() as taps:
        output = decoder(**decoder_inputs(model, input_ids, position_ids))
    states = {} if taps is None else {index: state.view(batch, tokens, -1) for index, state in taps.states.items()}
    return output.last_hidden_state.view(batch, tokens, -1), states


def decoder_inputs(
    model: PreTrainedModel, input_ids: Int[Tensor, "batch tokens"], position_ids: Int[Tensor, "batch tokens"]
) -> dict[str, Any]:
    """Keyword arguments of `model.get_decoder()` for packed documents: rows as they are, or laid end to end in one."""
    implementation, boundaries = model.config._attn_implementation or "", {}
    varlen = implementation == VARLEN or (implementation == DIVIDED and divided_rows() is None)
    if "flash" in implementation or varlen:
        # Both look for documents in a single row only, and a row is as good as a document.
        input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
    if varlen:
        cu_seqlens, longest = document_boundaries(position_ids)
        boundaries = {"cu_seq_lens_q": cu_seqlens, "max_length_q": longest}
    return {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False, **boundaries}


def head(model: PreTrainedModel) -> tuple[Float[Tensor, "vocab width"], Float[Tensor, " vocab"] | None]:
    """The matrix that turns final hidden states into logits, and its bias."""
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise UserError(None, f"{type(model).__name__} has no linear language-modelling head and cannot be distilled")
    return linear.weight, linear.bias


@torch.no_grad()
def check_head(model: PreTrainedModel, role: str) -> None:
    """Make sure that logits are head · final hidden states: no soft-capping, no scale, nothing in between.

    Raises:
        UserError: the model's own logits differ, or are not finite; the line names `role` (the YAML's key).
    """
    weight, bias = head(model)
    input_ids = torch.arange(8, device=weight.device).remainder(weight.shape[0]).unsqueeze(0)
    position_ids = torch.arange(8, device=weight.device).unsqueeze(0)
    training = model.training
    model.eval()
    hidden, _ = decode(model, input_ids, position_ids)
    ours = nn.functional.linear(hidden.to(weight), weight, bias).float()
    theirs = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits.float().to(ours.device)
    model.train(training)
    if overflowed(theirs):
        raise UserError(role, where_not_finite(model, input_ids, position_ids))
    if not torch.allclose(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max())):
        raise UserError(
            role,
            f"{type(model).__name__} changes its logits after the head (soft-capping or a scale, for example), "
            "which the losses here do not follow",
        )


def overflowed(logits: Float[Tensor, "*shape"]) -> bool:
    """Whether a logit is NaN or +inf. -inf is a token that cannot be."""
    return not bool((logits < torch.inf).all())


@torch.no_grad()
def where_not_finite(
    model: PreTrainedModel, input_ids: Int[Tensor, "batch tokens"], position_ids: Int[Tensor, "batch tokens"]
) -> str:
    """The problem of a model whose logits of this batch are not finite: behind which module that begins."""
    modules = {name: module for name, module in model.get_decoder().named_modules() if name}
    # A module ends after those in it, so that the first entry is the innermost.
    with recorded(modules, _returns_finite) as finite:
        decode(model, input_ids, position_ids)
    place = next((name for name, good in finite.items() if not good), "the head")
    hint = HALF if model.dtype == torch.float16 else "its weights or configuration are damaged"
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{type(model).__name__} in {dtype} gives NaN or infinity, first behind {place}; {hint}"


def _returns_finite(call: Call) -> bool:
    return not isinstance(call.output, Tensor) or is_finite(call.output)
