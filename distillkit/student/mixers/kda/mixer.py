"""Kimi Delta Attention as a mixer of the student."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from distillkit.config import InitializationConfig
from distillkit.student.mixers.kda.divided import divide_rows
from distillkit.student.mixers.kda.initialize import copy_attention, fit_output_scale, initialize_new_parameters
from distillkit.student.mixers.kda.kernel_costs import mix_as_kernels_do
from distillkit.student.mixers.mixer import PROJECTIONS, Mixer, Start

NORMS = ("q_norm", "k_norm")


class KDA(Mixer):
    """Takes over the teacher's projections; its state has one size for any number of tokens."""

    def check(self, attention: Any) -> str | None:
        if (problem := super().check(attention)) is not None:
            return problem
        if unknown := sorted({each.split(".")[0] for each, _ in attention.named_parameters()} - {*PROJECTIONS, *NORMS}):
            return f"has {', '.join(unknown)}, for which KDA has no place"
        heads = (attention.q_proj.out_features, attention.k_proj.out_features)
        if heads != (attention.o_proj.in_features, attention.v_proj.out_features):
            return "has heads of different sizes for queries, keys and values"
        return None

    def needs_attention_distances(self, options: InitializationConfig) -> bool:
        return options.memory == "attended"

    def initialize(self, layer: Any, attention: Any, start: Start) -> None:
        copy_attention(layer, attention)
        initialize_new_parameters(layer, start.options, start.std, start.generator, start.attention_distances)

    def calibrate(
        self,
        layer: Any,
        hidden_states: Float[Tensor, "batch tokens width"],
        attention_output: Float[Tensor, "batch tokens channels"],
    ) -> None:
        fit_output_scale(layer, hidden_states, attention_output)

    def divide_rows(self, layer: Any) -> bool:
        divide_rows(layer)
        return True

    def state_bytes(self, layer: Any) -> int:
        """Of the recurrent state in float32, and of the convolutions' last inputs."""
        recurrent = layer.num_heads * layer.head_dim**2 * torch.float32.itemsize
        weights = [convolution.weight for convolution in (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d)]
        convolution = sum(weight.shape[0] * (weight.shape[-1] - 1) * weight.dtype.itemsize for weight in weights)
        total: int = recurrent + convolution
        return total

    def plan_on_cuda(self, layer: Any, count_flops: Callable[[int], None]) -> None:
        mix_as_kernels_do(layer, count_flops)
