"""torch.compile, applied from outside to the parts of a step that repeat: decoder layers and losses.

What is compiled are functions, not modules: hooks, gradient checkpointing and DDP stay around them, parameter names do
not change, and one graph serves all layers of a kind. The attention kernels of flash-linear-attention and of packed
documents are left as they are.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from distillkit.losses import Objective

GRAPHS = 64
"""Graphs of one function before torch.compile gives up on it. Teacher's and student's layers share their class; each
kind of attention, dtype and number of documents in a batch may want its own, the last until it is taken as variable."""


@contextmanager
def compiled_step(
    student: PreTrainedModel, teacher: PreTrainedModel | None, objective: Objective, backend: str, mode: str | None
) -> Iterator[None]:
    """Within, the layers of both models and the losses are compiled.

    teacher: None where it is captured. Losses of attention outputs call the student's attention alone, and take the
    teacher's where it is called: then the parts of its layers are compiled, each by itself.
    """

    aligned = objective.attention_layers
    modules: list[nn.Module] = [*_layers(student)]
    modules += [_layers(student).get_submodule(f"{index}.self_attn") for index in aligned]
    for layer in [] if teacher is None else _layers(teacher):
        modules += layer.children() if aligned else [layer]
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=GRAPHS))
        for module in modules:
            module.forward = torch.compile(module.forward, backend=backend, mode=mode)
            stack.callback(delattr, module, "forward")
        stack.enter_context(objective.compiled(backend, mode))
        yield


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    layers: nn.ModuleList = model.get_decoder().layers
    return layers
