"""One token more through a KDA layer on a GPU, in two kernels: the short convolution, and all of a head after it.

A decoding step reads each weight and each state once; what it waits for beside them is the start of every kernel. So
normalisation, gates, the delta rule and the gated RMSNorm of a head are one kernel, and states are updated in place.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl


@triton.jit
def _convolution_kernel(  # type: ignore[no-untyped-def]  -- pointers and numbers of Triton's
    query,
    key,
    value,
    query_weight,
    key_weight,
    value_weight,
    state,  # [rows, TAPS - 1, channels of the three]
    output,  # [rows, channels of the three]
    query_size,
    kv_size,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kind = tl.program_id(1)
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    all_channels = query_size + 2 * kv_size
    x, weight, size, first = query, query_weight, query_size, 0
    if kind == 1:
        x, weight, size, first = key, key_weight, kv_size, query_size
    if kind == 2:
        x, weight, size, first = value, value_weight, kv_size, query_size + kv_size
    inside = channel < size
    new = tl.load(x + row * size + channel, mask=inside)
    total = new.to(tl.float32) * tl.load(weight + channel * TAPS + TAPS - 1, mask=inside).to(tl.float32)
    past = state + row * (TAPS - 1) * all_channels + first + channel
    for tap in tl.static_range(TAPS - 1):
        old = tl.load(past + tap * all_channels, mask=inside)
        total += old.to(tl.float32) * tl.load(weight + channel * TAPS + tap, mask=inside).to(tl.float32)
        if tap > 0:
            tl.store(past + (tap - 1) * all_channels, old, mask=inside)
    tl.store(past + (TAPS - 2) * all_channels, new, mask=inside)
    total = total.to(new.dtype).to(tl.float32)  # as a convolution in that dtype returns it
    silu = total * tl.sigmoid(total)
    tl.store(output + row * all_channels + first + channel, silu.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _delta_rule_kernel(  # type: ignore[no-untyped-def]
    convolved,  # [rows, channels of queries, keys and values]
    decay_gate,  # [rows, heads * SIZE]
    beta_gate,  # [rows, heads]
    output_gate,  # [rows, heads * SIZE]
    state,  # [rows, heads, SIZE, SIZE], keys before values
    A_log,
    dt_bias,
    norm_weight,
    output,  # [rows, heads * SIZE]
    norm_eps,
    lower_bound,
    scale,
    heads,
    kv_heads,
    SAFE_GATE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    kv_head = head // (heads // kv_heads)
    channel = tl.arange(0, BLOCK)
    inside = channel < SIZE
    of_row = convolved + row * (heads + 2 * kv_heads) * SIZE + channel
    query = tl.load(of_row + head * SIZE, mask=inside, other=0.0).to(tl.float32)
    key = tl.load(of_row + (heads + kv_head) * SIZE, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(of_row + (heads + kv_heads + kv_head) * SIZE, mask=inside, other=0.0).to(tl.float32)
    query = query * (scale / tl.sqrt(tl.sum(query * query) + 1e-6))
    key = key / tl.sqrt(tl.sum(key * key) + 1e-6)

    of_head = (row * heads + head) * SIZE + channel
    gate = tl.load(decay_gate + of_head, mask=inside, other=0.0).to(tl.float32)
    gate += tl.load(dt_bias + head * SIZE + channel, mask=inside, other=0.0).to(tl.float32)
    rate = tl.exp(tl.load(A_log + head).to(tl.float32))
    if SAFE_GATE:
        decay = lower_bound * tl.sigmoid(rate * gate)
    else:
        softplus = tl.maximum(gate, 0.0) + tl.log(1 + tl.exp(-tl.abs(gate)))
        decay = -rate * softplus
    beta = tl.sigmoid(tl.load(beta_gate + row * heads + head).to(tl.float32))

    places = (row * heads + head) * SIZE * SIZE + channel[:, None] * SIZE + channel[None, :]
    square = inside[:, None] & inside[None, :]
    memory = tl.load(state + places, mask=square, other=0.0).to(tl.float32) * tl.exp(decay)[:, None]
    update = beta * (value - tl.sum(memory * key[:, None], axis=0))
    memory += key[:, None] * update[None, :]
    tl.store(state + places, memory.to(state.dtype.element_ty), mask=square)

    mixed = tl.sum(memory * query[:, None], axis=0)
    mixed = mixed / tl.sqrt(tl.sum(mixed * mixed) / SIZE + norm_eps)
    mixed *= tl.load(norm_weight + channel, mask=inside, other=0.0).to(tl.float32)
    mixed *= tl.sigmoid(tl.load(output_gate + of_head, mask=inside, other=0.0).to(tl.float32))
    tl.store(output + of_head, mixed.to(output.dtype.element_ty), mask=inside)


def kda_step(
    projected: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    decay_gate: torch.Tensor,
    beta_gate: torch.Tensor,
    output_gate: torch.Tensor,
    conv_state: torch.Tensor,
    recurrent_state: torch.Tensor,
    *,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float,
    head_dim: int,
    lower_bound: float | None,
) -> torch.Tensor:
    """From the projections of one token per row to what the output projection takes; updates both states.

    Args:
        projected: queries, keys and values before their convolution, each ``[rows, 1, channels]``.
        weights: of those convolutions, each ``[channels, conv_size]``.
        decay_gate, output_gate: ``[rows, 1, heads * head_dim]``. beta_gate: ``[rows, 1, heads]``.
        conv_state: ``[rows, conv_size - 1, channels of all three]``.
        recurrent_state: ``[rows, heads, head_dim, head_dim]``.
        A_log, dt_bias, lower_bound: see ``delta_rule.log_decay``. norm_weight, norm_eps: of the gated RMSNorm.

    Returns: ``[rows, 1, heads * head_dim]``, in the dtype of the projections.
    """
    query, key, value = (each.contiguous() for each in projected)
    rows, heads, kv_heads = len(query), query.shape[-1] // head_dim, key.shape[-1] // head_dim
    convolved = query.new_empty(rows, query.shape[-1] + 2 * key.shape[-1])
    block = 256
    _convolution_kernel[(rows, 3, triton.cdiv(query.shape[-1], block))](
        query,
        key,
        value,
        *weights,
        conv_state,
        convolved,
        query.shape[-1],
        key.shape[-1],
        TAPS=weights[0].shape[-1],
        BLOCK=block,
        num_warps=2,
    )
    output = torch.empty_like(query)
    _delta_rule_kernel[(rows * heads,)](
        convolved,
        decay_gate.contiguous(),
        beta_gate.contiguous(),
        output_gate.contiguous(),
        recurrent_state,
        A_log,
        dt_bias,
        norm_weight,
        output,
        norm_eps,
        0.0 if lower_bound is None else lower_bound,
        head_dim**-0.5,
        heads,
        kv_heads,
        SAFE_GATE=lower_bound is not None,
        SIZE=head_dim,
        BLOCK=triton.next_power_of_2(head_dim),
        num_warps=8,
    )
    return output
