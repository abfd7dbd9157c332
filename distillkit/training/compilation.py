"""torch.compile, applied from outside to the parts of a step that repeat: those of decoder layers, and losses.

What is compiled are functions, not modules: hooks, gradient checkpointing and DDP stay around them, parameter names do
not change, and one graph serves all layers. The attention kernels of flash-linear-attention and of packed
documents are left as they are.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from distillkit.losses import Objective
from distillkit.models.recorder import replaced_forward

GRAPHS = 64
"""Graphs of one function before torch.compile gives up on it: teacher and student share their classes, and each dtype,
with gradients and without, wants its own."""


@dataclass(frozen=True)
class Compilation:
    """How torch.compile is to be called."""

    backend: str
    mode: str | None


@contextmanager
def compiled_step(
    student: PreTrainedModel, teacher: PreTrainedModel | None, objective: Objective, how: Compilation | None
) -> Iterator[None]:
    """Within, the parts of both models' layers (attention, MLP, norms) and the losses are compiled.

    Parts and not layers: transformers checkpoints inside of a layer's forward, and a graph that holds a checkpoint may
    not be broken, as the attention kernels break it; and attention alignment calls attention alone.

    teacher: None where it is captured. how: None compiles nothing.
    """
    if how is None:
        yield
        return
    models = [student] if teacher is None else [student, teacher]
    modules = [part for model in models for layer in model.get_decoder().layers for part in layer.children()]
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=GRAPHS))
        for module in modules:
            compiled = torch.compile(module.forward, backend=how.backend, mode=how.mode)
            stack.enter_context(replaced_forward(module, compiled))
        stack.enter_context(objective.compiled(how.backend, how.mode))
        yield
