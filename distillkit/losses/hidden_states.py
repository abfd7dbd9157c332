"""Losses between hidden states, and the hooks that pick those states up while a decoder runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distillkit.distribution import at_least_float32
from distillkit.losses.divergences import PerToken


def hs_mse(student_hidden: Float[Tensor, "tokens width"], teacher_hidden: Float[Tensor, "tokens width"]) -> PerToken:
    """Mean over the width of the squared difference, one per token."""
    difference = at_least_float32(student_hidden) - at_least_float32(teacher_hidden)
    sums = difference.square().mean(-1)
    return sums, torch.ones_like(sums)


def hs_cosine(student_hidden: Float[Tensor, "tokens width"], teacher_hidden: Float[Tensor, "tokens width"]) -> PerToken:
    """1 - cosine similarity, one per token; between 0 and 2."""
    sums = 1 - F.cosine_similarity(at_least_float32(student_hidden), at_least_float32(teacher_hidden), dim=-1)
    return sums, torch.ones_like(sums)


class HiddenStateTaps:
    """Hooks on a Hugging Face decoder (`model.get_decoder()`) that keep the hidden states of one forward pass.

    Indices are those of transformers' `output_hidden_states`: 0 is the embeddings, i the output of layer i - 1, and L,
    the number of layers, the output of the final norm (`final_norm=True`) or of the last layer itself (`False`).
    `states[i]` is then a tensor [batch, tokens, width] that belongs to the graph of that pass; the next pass starts
    anew. Nothing that is not asked for is kept.

        with HiddenStateTaps(model.get_decoder(), [0, 6, 12]) as taps:
            model(**batch)
        taps.states[6]

    The decoder must have `embed_tokens`, `layers` and `norm`, as every Llama-like model of transformers has. Where a
    layer is compiled as a module (`layer.compile()`, not its forward), enter once for the whole training: torch.compile
    does not notice hooks that change later.
    Raises ValueError for an index outside 0..L.
    """

    def __init__(self, decoder: nn.Module, indices: Iterable[int], *, final_norm: bool = True) -> None:
        self.states: dict[int, Tensor] = {}
        self._decoder = decoder
        stages = [cast(nn.Module, decoder.embed_tokens), *cast(nn.ModuleList, decoder.layers)]
        if final_norm:
            stages[-1] = cast(nn.Module, decoder.norm)
        self._tapped: dict[int, nn.Module] = {}
        for index in sorted(set(indices)):
            if not 0 <= index < len(stages):
                raise ValueError(f"hidden state {index} does not exist: the model has 0 to {len(stages) - 1}")
            self._tapped[index] = stages[index]
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> HiddenStateTaps:
        self._handles = [self._decoder.register_forward_pre_hook(self._start)]
        for index, module in self._tapped.items():
            self._handles.append(module.register_forward_hook(self._keep(index)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _start(self, module: nn.Module, args: Any) -> None:
        self.states.clear()

    def _keep(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # Checkpointing runs a module again during the backward pass: what the loss used is the first run's.
            self.states.setdefault(index, output[0] if isinstance(output, tuple) else output)

        return hook
