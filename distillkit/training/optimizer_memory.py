"""What an optimizer keeps for its parameters, and what it needs while it steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distillkit.training.optimizers import SLICE

_QUANTIZED = {"adamw_torch_8bit": (2.0, 256), "adamw_torch_4bit": (1.0, 128)}
"""torchao's AdamW: bytes of both moments per weight, and weights per float32 scale of a moment. Weights that are few
or no multiple of the block are kept as they are."""

_COPIES = {"sgd": 0, "adafactor": 0, "lion_32bit": 1, "rmsprop": 1, "adagrad": 1}
"""Numbers per weight of optimizers that are no Adam, in the weight's dtype; of Adafactor a row and a column."""


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes. states: alive for the whole training. working: while it steps."""

    states: int
    working: int


def optimizer_memory(optim: str, trained: Sequence[Tensor], *, cuda: bool) -> OptimizerMemory:
    """Of the optimizer that `training_args.optim` names, over trained parameters; of divided ones, the local parts."""
    largest = max((parameter.numel() for parameter in trained), default=0)
    numbers = sum(parameter.numel() for parameter in trained)
    stored = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    if optim in _QUANTIZED:
        states = sum(_quantized(parameter, *_QUANTIZED[optim]) for parameter in trained)
        return OptimizerMemory(int(states), 4 * 4 * largest)
    if "8bit" in optim:  # bitsandbytes
        return OptimizerMemory(int(2.03 * numbers), 0)
    copies = next((copies for name, copies in _COPIES.items() if optim.startswith(name)), 2)
    if any(parameter.dtype == torch.bfloat16 for parameter in trained):  # StochasticAdamW, slice by slice
        return OptimizerMemory(copies * stored, 7 * 4 * min(largest, SLICE))
    fused = cuda and optim in ("adamw_torch", "adamw_torch_fused")
    return OptimizerMemory(copies * stored, 0 if fused else 2 * 4 * largest)


def _quantized(parameter: Tensor, bytes_per_weight: float, block: int) -> float:
    count = parameter.numel()
    if count < 4096 or count % block:
        return 2.0 * count * parameter.element_size()
    return count * (bytes_per_weight + 2 * 4 / block)
