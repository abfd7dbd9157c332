"""Full attention in a student: the teacher's own module, with its weights, kernels and cache; without positions (NoPE)
unless the configuration keeps them.

A rotary embedding turns queries and keys by cos and sin of an angle. With cos = 1 and sin = 0 it turns nothing, so the
teacher's module serves unchanged.
"""

from typing import Any

import torch
from torch import nn


def keep_full_attention(attention: nn.Module, config: Any, layer_idx: int) -> nn.Module:
    """The teacher's attention, which takes no documents and, unless ``config.use_rope``, no positions."""
    attention.register_forward_pre_hook(_without_documents, with_kwargs=True)
    if not config.use_rope:
        attention.register_forward_pre_hook(_at_angle_zero, with_kwargs=True)
    return attention


def _without_documents(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {name: value for name, value in kwargs.items() if name != "documents"}


def _at_angle_zero(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    cos, sin = kwargs["position_embeddings"]
    return args, {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}
