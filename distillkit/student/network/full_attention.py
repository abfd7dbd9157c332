"""Full attention in a student: the teacher's own module, with its weights, kernels and cache; without positions (NoPE)
unless the configuration keeps them.

A layer without positions computes what the teacher's does with every position 0. The rotary embedding is not left out
for that but asked for position 0: its cos is not 1 there where it scales attention (YaRN, longrope).
"""

from typing import Any

import torch
from torch import nn


def keep_full_attention(attention: nn.Module, config: Any, layer_idx: int) -> nn.Module:
    """The teacher's attention, which takes no documents."""
    attention.register_forward_pre_hook(_without_documents, with_kwargs=True)
    return attention


def forget_positions(rotary_embedding: nn.Module) -> None:
    """Let a decoder's rotary embedding, called with ``(hidden_states, position_ids, …)``, give that of position 0."""
    rotary_embedding.register_forward_pre_hook(_at_position_zero, with_kwargs=True)


def _without_documents(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {name: value for name, value in kwargs.items() if name != "documents"}


def _at_position_zero(rotary: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": torch.zeros_like(kwargs["position_ids"])}
    hidden_states, position_ids, *others = args
    return (hidden_states, torch.zeros_like(position_ids), *others), kwargs
