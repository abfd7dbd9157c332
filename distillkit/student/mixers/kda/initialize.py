"""How a KDA layer starts: from the teacher's projections, and with what the teacher has no counterpart for.

What is known of the teacher's attention is kept: its query, key, value and output projections, biases included, and
the gains of its query and key norms. The rest follows flash-linear-attention's initialisation, except for what was
found to matter (`benchmarks/initialization.py`, figures in `initialization.json` and `initialization_memory.json` of
`benchmarks/results`): the short convolutions start as the identity, small enough for queries and keys that the SiLU
behind it is almost linear; each head forgets at one rate, by default as far back as the teacher's head looks; and the
size of the layer's output is fitted to the teacher's, channel by channel. Without the last, the normalisation of KDA's
output makes each layer's output several times too large.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distillkit.config import InitializationConfig
from distillkit.models.recorder import recorded
from distillkit.student.network import KimiDeltaAttention

SHORTEST_MEMORY, LONGEST_SPREAD = 2.0, 256.0
"""Tokens in which a head's state decays by a factor e: at the least, and of the last head where they are spread."""

LINEAR_TAP = 0.1
"""Size of the identity before a SiLU that is to be almost linear; queries and keys are brought to length one anyway."""

LARGEST_GATE = 0.8
"""Opening of the output gate of the channel with the largest scale; the others are less open."""

SMALLEST_SCALE = 0.02
"""Smallest scale of a channel, relative to the largest: no gate starts so far closed that it cannot learn."""


@torch.no_grad()
def copy_attention(kda: KimiDeltaAttention, attention: nn.Module) -> None:
    """Give a KDA layer the projections of the teacher's attention.

    Where the layer has a key and value head for each query head, those of the teacher are repeated. KDA has no norms of
    queries and keys but brings both to length one itself; the gains of the teacher's norms are multiplied into the rows
    (and biases) that make the channel, which keeps the direction of queries and keys.
    """
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        source, target = attention.get_submodule(name), kda.get_submodule(name)
        for parameter, rows in source.named_parameters():
            value = rows.detach()
            if name in ("q_proj", "k_proj"):
                value = value * _gains(attention, name.replace("proj", "norm"), value).to(value)
            if name in ("k_proj", "v_proj"):
                heads = value.unflatten(0, (-1, kda.head_dim))
                value = heads.repeat_interleave(kda.num_kv_heads // heads.shape[0], dim=0).flatten(0, 1)
            target.get_parameter(parameter).copy_(value)


def _gains(attention: nn.Module, name: str, rows: Tensor) -> Tensor:
    """The gain of each row's channel, `[rows, 1, …]`: what a norm makes of ones. Ones if there is no such norm."""
    norm = dict(attention.named_children()).get(name)
    if norm is None:
        return torch.ones((), device=rows.device)
    size = next(norm.parameters()).shape[-1]  # of a head, or of all heads
    gains: Tensor = norm(torch.ones(size, dtype=torch.float32, device=rows.device))
    return gains.repeat(rows.shape[0] // size).view(-1, *[1] * (rows.dim() - 1))


@torch.no_grad()
def initialize_new_parameters(
    kda: KimiDeltaAttention,
    options: InitializationConfig,
    std: float,
    generator: torch.Generator,
    distance: Float[Tensor, " heads"] | None = None,
) -> None:
    """Set every parameter that the teacher has no counterpart for.

    std: of the normal distribution of the low-rank gates and of beta's projection (the teacher's `initializer_range`).
    generator: on the CPU, so that a seed means the same on every device.
    distance: tokens that each head of the teacher looks back, for `memory: attended`.
    """
    for linear in (*kda.f_proj, kda.b_proj, *kda.g_proj):
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * std)
    kda.g_proj.get_parameter("1.bias").zero_()
    kda.o_norm.weight.fill_(1)
    for convolution in (kda.q_conv1d, kda.k_conv1d, kda.v_conv1d):
        if options.short_convolution == "default":
            bound = 1 / math.sqrt(convolution.weight.shape[-1])
            convolution.weight.copy_((torch.rand(convolution.weight.shape, generator=generator) * 2 - 1) * bound)
        else:
            linear = options.short_convolution == "linear" and convolution is not kda.v_conv1d
            convolution.weight.zero_()
            convolution.weight[..., -1] = LINEAR_TAP if linear else 1  # the last tap is on the token itself
    if distance is None:
        distance = torch.linspace(math.log(SHORTEST_MEMORY), math.log(LONGEST_SPREAD), kda.num_heads).exp()
    set_memory(kda, distance.clamp(min=SHORTEST_MEMORY).repeat_interleave(kda.head_dim))


@torch.no_grad()
def set_memory(kda: KimiDeltaAttention, memory: Float[Tensor, " channels"]) -> None:
    """Let each channel of the state decay by a factor e within so many tokens, where the decay's projection is silent.

    KDA's decay is exp(g) with g = lower_bound · sigmoid(exp(A_log) · (f + dt_bias)), and without a lower bound
    g = −exp(A_log) · softplus(f + dt_bias); f, the projection, starts near 0, and A_log at 0.
    """
    kda.A_log.zero_()
    if kda.gate_lower_bound is None:
        kda.dt_bias.copy_(torch.expm1(1 / memory).log())
    else:
        kda.dt_bias.copy_(torch.logit(1 / memory / -kda.gate_lower_bound))


@torch.no_grad()
def fit_output_scale(
    kda: KimiDeltaAttention,
    hidden_states: Float[Tensor, "batch tokens width"],
    attention_output: Float[Tensor, "batch tokens channels"],
) -> None:
    """Scale the output of a layer, channel by channel, to the least squared distance from the teacher's attention.

    hidden_states: what the teacher's layer was given.
    attention_output: what its heads made of it, before the output projection.

    The scale is put into the output norm (one constant) and the bias of the output gate. A channel on which the layer
    does not follow the teacher's output is thereby scaled down.
    """
    with recorded({"output": kda.o_proj}, lambda call: call.input) as records:
        kda(hidden_states)
    ours = records["output"].flatten(0, 1).float()
    theirs = attention_output.flatten(0, 1).float()
    gate_bias = kda.g_proj.get_parameter("1.bias")
    gate = torch.sigmoid(gate_bias.float())
    scale = gate * (ours * theirs).sum(0) / ours.square().sum(0).clamp(min=torch.finfo(torch.float32).tiny)
    loudest = scale.max().clamp(min=torch.finfo(torch.float32).eps)
    opening = LARGEST_GATE * (scale / loudest).clamp(min=SMALLEST_SCALE)
    kda.o_norm.weight.mul_(loudest / LARGEST_GATE)
    gate_bias.copy_(torch.logit(opening))
