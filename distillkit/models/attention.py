"""What a decoder's attention is given and returns: recorded in a teacher, and asked of a student on the same inputs.

Attention is what a decoder layer calls `self_attn`, whatever it computes: softmax attention, with positions or
without, or another mixer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from distillkit.config.errors import UserError
from distillkit.models.decoder import decoder_inputs
from distillkit.models.recorder import Call, recorded, replaced_forward

Attend = Callable[[], Float[Tensor, "batch tokens width"]]


@dataclass(frozen=True)
class AttentionRecord:
    """What one layer's attention was given (after the layer's input norm) and returned; no gradient flows into it."""

    input: Float[Tensor, "batch tokens width"]
    output: Float[Tensor, "batch tokens width"]


def trained_attention(model: PreTrainedModel) -> dict[int, list[nn.Parameter]]:
    """The trainable parameters of each layer's attention, by layer; layers whose attention has none are left out."""
    trained = {
        index: [parameter for parameter in layer.self_attn.parameters() if parameter.requires_grad]
        for index, layer in enumerate(model.get_decoder().layers)
        if hasattr(layer, "self_attn")
    }
    return {index: parameters for index, parameters in trained.items() if parameters}


@contextmanager
def recorded_attention(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[dict[int, AttentionRecord]]:
    """Within, each forward pass of `model` puts here what the attention of `layers` was given and returned.

    Raises:
        UserError: a layer has no `self_attn`.
    """

    def keep(call: Call) -> AttentionRecord:
        return AttentionRecord(call.input.detach(), call.output.detach())

    with recorded(_attention(model, layers), keep) as records:
        yield records


def attention_calls(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch tokens"],
    position_ids: Int[Tensor, "batch tokens"],
    inputs: Mapping[int, Float[Tensor, "batch tokens width"]],
) -> dict[int, Attend]:
    """For each layer of `inputs` a call of its attention on that input.

    Everything else that attention is handed (masks, document boundaries, position embeddings) is made by the decoder
    itself, of which nothing but that is run: no layer, and nothing that has a gradient.
    """
    given = decoder_inputs(model, input_ids, position_ids)
    with torch.no_grad(), _noted_arguments(model, inputs) as arguments:
        model.get_decoder()(**given)
    layout = given["input_ids"].shape
    return {
        index: partial(_attend, attention, arguments[index], inputs[index], layout)
        for index, attention in _attention(model, inputs).items()
    }


def _attend(
    attention: nn.Module,
    arguments: Mapping[str, Any],
    hidden_states: Float[Tensor, "batch tokens width"],
    layout: tuple[int, int],
) -> Float[Tensor, "batch tokens width"]:
    """`layout`: (rows, tokens) in which the decoder sees the batch."""
    batch, tokens, width = hidden_states.shape
    hidden_states = hidden_states.to(_computing_dtype(attention, hidden_states.device.type))
    call = Call((), arguments, attention(hidden_states=hidden_states.reshape(*layout, width), **arguments))
    return call.output.reshape(batch, tokens, width)


@contextmanager
def _noted_arguments(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[dict[int, dict[str, Any]]]:
    """Within, decoder layers do nothing but note what they are handed beside hidden states, for their attention."""
    noted: dict[int, dict[str, Any]] = {}
    wanted = set(layers)

    def note(index: int, hidden_states: Tensor, **arguments: Any) -> Tensor:
        if index in wanted:
            noted[index] = arguments
        return hidden_states

    with ExitStack() as stack:
        for index, layer in enumerate(model.get_decoder().layers):
            stack.enter_context(replaced_forward(layer, partial(note, index)))
        yield noted


def _attention(model: PreTrainedModel, layers: Iterable[int]) -> dict[int, nn.Module]:
    modules = model.get_decoder().layers
    for index in layers:
        if not hasattr(modules[index], "self_attn"):
            raise UserError(
                "loss_functions",
                f"layer {index} of {type(model).__name__} has no self_attn, which attn_mse and "
                "attn_cosine compare; remove them",
            )
    return {index: modules[index].self_attn for index in layers}


def _computing_dtype(attention: nn.Module, device_type: str) -> torch.dtype:
    """Autocast's dtype, or that of the projections (vectors beside them may be kept in float32)."""
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return next(parameter.dtype for parameter in attention.parameters() if parameter.dim() == 2)
