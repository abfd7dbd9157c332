"""Full attention without positions (NoPE): the teacher's own attention, told that every token stands at angle 0.

A rotary embedding turns queries and keys by cos and sin of an angle. With cos = 1 and sin = 0 it turns nothing, so the
teacher's module serves unchanged, with its weights, kernels and cache.
"""

from typing import Any

import torch
from torch import nn


def remove_rotary_embedding(attention: nn.Module) -> None:
    """Make ``attention`` a NoPE layer, whatever ``position_embeddings`` its decoder hands it."""
    attention.register_forward_pre_hook(_at_angle_zero, with_kwargs=True)


def _at_angle_zero(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    cos, sin = kwargs["position_embeddings"]
    return args, {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}
