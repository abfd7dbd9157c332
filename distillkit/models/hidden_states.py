"""Hooks that keep the hidden states of a decoder while it runs."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, Self, cast

from torch import Tensor, nn


class HiddenStateTaps(ExitStack):
    """Hooks on a Hugging Face decoder (`model.get_decoder()`) that keep the hidden states of one forward pass.

    Indices are those of transformers' `output_hidden_states`: 0 is the embeddings, i the output of layer i - 1, and L,
    the number of layers, the output of the final norm (`final_norm=True`) or of the last layer itself (`False`).
    `states[i]` is then a tensor [batch, tokens, width] that belongs to the graph of that pass; the next pass
    replaces it. Only the given indices are kept.

        with HiddenStateTaps(model.get_decoder(), [0, 6, 12]) as taps:
            model(**batch)
        taps.states[6]

    The decoder must have `embed_tokens`, `layers` and `norm`, as every Llama-like model of transformers has. Where a
    layer is compiled as a module (`layer.compile()`, not its forward), enter once for the whole training: torch.compile
    does not notice hooks that change later.
    Raises ValueError for an index outside 0..L.
    """

    def __init__(self, decoder: nn.Module, indices: Iterable[int], *, final_norm: bool = True) -> None:
        super().__init__()
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

    def __enter__(self) -> Self:
        self.enter_context(self._decoder.register_forward_pre_hook(self._start))
        for index, module in self._tapped.items():
            self.enter_context(module.register_forward_hook(self._keep(index)))
        return self

    def _start(self, module: nn.Module, args: Any) -> None:
        self.states.clear()

    def _keep(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # Checkpointing runs a module again during the backward pass: what the loss used is the first run's.
            self.states.setdefault(index, output[0] if isinstance(output, tuple) else output)

        return hook
