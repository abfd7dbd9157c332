"""torch.compile, applied from outside to the parts of a step that repeat: those of decoder layers, and losses.

What is compiled are functions, not modules: hooks, gradient checkpointing and DDP stay around them, parameter names do
not change, and one graph serves all layers. The attention kernels of flash-linear-attention and of packed
documents are left as they are.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from transformers import PreTrainedModel

from distillkit.losses import Objective

GRAPHS = 64
"""Graphs of one function before torch.compile gives up on it. Teacher and student share their classes; each dtype and
number of documents in a batch may want its own graph, the latter until it is taken as variable."""


@contextmanager
def compiled_step(
    student: PreTrainedModel, teacher: PreTrainedModel | None, objective: Objective, backend: str, mode: str | None
) -> Iterator[None]:
    """Within, the parts of both models' layers (attention, MLP, norms) and the losses are compiled.

    Parts and not layers: transformers checkpoints inside of a layer's forward, and a graph that holds a checkpoint may
    not be broken, as the attention kernels break it; and attention alignment calls attention alone.

    teacher: None where it is captured.
    """
    models = [student] if teacher is None else [student, teacher]
    modules = [part for model in models for layer in model.get_decoder().layers for part in layer.children()]
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=GRAPHS))
        for module in modules:
            module.forward = torch.compile(module.forward, backend=backend, mode=mode)
            stack.callback(delattr, module, "forward")
        stack.enter_context(objective.compiled(backend, mode))
        yield
