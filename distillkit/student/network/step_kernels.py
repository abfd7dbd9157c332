"""One token more through a KDA layer on a GPU, in three kernels between its norm and its output projection.

A decoding step reads each weight and each state once, and beyond that mostly waits for kernels to start. So one kernel
makes all projections of a token and the short convolutions of three of them, one the second halves of both low-rank
gates, and one all the rest of a head: normalisation, gates, the delta rule, the gated RMSNorm. States are updated in
place.
"""

import functools
from typing import Any

import torch
from torch import nn

try:  # transformers asks for what a saved network imports elsewhere, on a CPU, too
    import triton
    import triton.language as tl
except ImportError:
    raise


@triton.jit
def _weight_times_tokens(x, weight, channels, tokens, channel_count, token_count, INNER, BLOCK_INNER, C, T):  # type: ignore
    """``[C, T]``, float32: rows ``channels`` of a weight ``[channel_count, INNER]`` times rows ``tokens`` of ``x``."""
    total = tl.zeros((C, T), tl.float32)
    for start in range(0, INNER, BLOCK_INNER):
        inner = start + tl.arange(0, BLOCK_INNER)
        w = tl.load(
            weight + channels.to(tl.int64)[:, None] * INNER + inner[None, :],
            mask=(channels < channel_count)[:, None] & (inner < INNER)[None, :],
            other=0.0,
        )
        y = tl.load(
            x + tokens.to(tl.int64)[None, :] * INNER + inner[:, None],
            mask=(tokens < token_count)[None, :] & (inner < INNER)[:, None],
            other=0.0,
        )
        total = tl.dot(w, y, total, input_precision="ieee")
    return total


@triton.jit
def _projection_kernel(  # type: ignore
    x,  # [rows, HIDDEN]
    query_weight,
    key_weight,
    value_weight,
    query_bias,
    key_bias,
    value_bias,
    query_taps,  # [channels, TAPS]
    key_taps,
    value_taps,
    decay_weight,
    output_weight,
    beta_weight,
    conv_state,  # [rows, TAPS - 1, channels of queries, keys and values]
    convolved,  # [rows, the same channels]
    decay,  # [rows, RANK]
    gate,  # [rows, RANK]
    beta,  # [rows, heads]
    rows,
    query_size,
    kv_size,
    heads,
    HIDDEN: tl.constexpr,
    RANK: tl.constexpr,
    TAPS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
):
    query_blocks, kv_blocks = tl.cdiv(query_size, C), tl.cdiv(kv_size, C)
    block = tl.program_id(1)
    tokens = tl.program_id(0) * T + tl.arange(0, T)
    if block < query_blocks + 2 * kv_blocks:
        weight, bias, taps, size, first = query_weight, query_bias, query_taps, query_size, 0
        if block >= query_blocks:
            block -= query_blocks
            weight, bias, taps, size, first = key_weight, key_bias, key_taps, kv_size, query_size
            if block >= kv_blocks:
                block -= kv_blocks
                weight, bias, taps, first = value_weight, value_bias, value_taps, query_size + kv_size
        channels = block * C + tl.arange(0, C)
        products = _weight_times_tokens(x, weight, channels, tokens, size, rows, HIDDEN, BLOCK_HIDDEN, C, T)
        inside = channels < size
        if BIAS:
            products += tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)[:, None]
        new = products.to(convolved.dtype.element_ty)
        both = inside[:, None] & (tokens < rows)[None, :]
        total = new.to(tl.float32) * tl.load(taps + channels * TAPS + TAPS - 1, mask=inside).to(tl.float32)[:, None]
        all_channels = query_size + 2 * kv_size
        of_token = tokens.to(tl.int64)[None, :] * all_channels + first + channels[:, None]
        past = conv_state + tokens.to(tl.int64)[None, :] * ((TAPS - 2) * all_channels) + of_token
        for tap in tl.static_range(TAPS - 1):
            old = tl.load(past + tap * all_channels, mask=both)
            total += old.to(tl.float32) * tl.load(taps + channels * TAPS + tap, mask=inside).to(tl.float32)[:, None]
            if tap > 0:
                tl.store(past + (tap - 1) * all_channels, old, mask=both)
        tl.store(past + (TAPS - 2) * all_channels, new.to(conv_state.dtype.element_ty), mask=both)
        total = total.to(new.dtype).to(tl.float32)  # as a convolution in that dtype returns it
        tl.store(convolved + of_token, (total * tl.sigmoid(total)).to(new.dtype), mask=both)
    else:
        block -= query_blocks + 2 * kv_blocks
        rank_blocks = tl.cdiv(RANK, C)
        weight, out, size = decay_weight, decay, RANK
        if block >= rank_blocks:
            block -= rank_blocks
            weight, out = output_weight, gate
            if block >= rank_blocks:
                block -= rank_blocks
                weight, out, size = beta_weight, beta, heads
        channels = block * C + tl.arange(0, C)
        products = _weight_times_tokens(x, weight, channels, tokens, size, rows, HIDDEN, BLOCK_HIDDEN, C, T)
        places = tokens.to(tl.int64)[None, :] * size + channels[:, None]
        tl.store(
            out + places, products.to(out.dtype.element_ty), mask=(channels < size)[:, None] & (tokens < rows)[None, :]
        )


@triton.jit
def _gate_kernel(  # type: ignore
    decay,  # [rows, RANK]
    gate,  # [rows, RANK]
    decay_weight,  # [size, RANK]
    output_weight,  # [size, RANK]
    output_bias,  # [size]
    wide_decay,  # [rows, size]
    wide_gate,  # [rows, size]
    rows,
    size,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
):
    blocks = tl.cdiv(size, C)
    block = tl.program_id(1)
    x, weight, out = decay, decay_weight, wide_decay
    bias = 0.0
    if block >= blocks:
        block -= blocks
        x, weight, out = gate, output_weight, wide_gate
        bias = 1.0
    tokens = tl.program_id(0) * T + tl.arange(0, T)
    channels = block * C + tl.arange(0, C)
    new = _weight_times_tokens(x, weight, channels, tokens, size, rows, RANK, BLOCK_RANK, C, T)
    new += bias * tl.load(output_bias + channels, mask=channels < size, other=0.0).to(tl.float32)[:, None]
    places = tokens.to(tl.int64)[None, :] * size + channels[:, None]
    tl.store(out + places, new.to(out.dtype.element_ty), mask=(channels < size)[:, None] & (tokens < rows)[None, :])


@triton.jit
def _delta_rule_kernel(  # type: ignore
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
    places = (row * heads + head) * SIZE * SIZE + channel[:, None] * SIZE + channel[None, :]
    square = inside[:, None] & inside[None, :]
    memory = tl.load(state + places, mask=square, other=0.0).to(tl.float32)

    of_row = convolved + row * (heads + 2 * kv_heads) * SIZE + channel
    query = tl.load(of_row + head * SIZE, mask=inside, other=0.0).to(tl.float32)
    key = tl.load(of_row + (heads + kv_head) * SIZE, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(of_row + (heads + kv_heads + kv_head) * SIZE, mask=inside, other=0.0).to(tl.float32)
    of_head = (row * heads + head) * SIZE + channel
    gate = tl.load(decay_gate + of_head, mask=inside, other=0.0).to(tl.float32)
    gate += tl.load(dt_bias + head * SIZE + channel, mask=inside, other=0.0).to(tl.float32)
    rate = tl.exp(tl.load(A_log + head).to(tl.float32))
    beta = tl.sigmoid(tl.load(beta_gate + row * heads + head).to(tl.float32))
    query = query * (scale / tl.sqrt(tl.sum(query * query) + 1e-6))
    key = key / tl.sqrt(tl.sum(key * key) + 1e-6)
    if SAFE_GATE:
        decay = lower_bound * tl.sigmoid(rate * gate)
    else:
        decay = -rate * (tl.maximum(gate, 0.0) + tl.log(1 + tl.exp(-tl.abs(gate))))

    memory *= tl.exp(decay)[:, None]
    update = beta * (value - tl.sum(memory * key[:, None], axis=0))
    memory += key[:, None] * update[None, :]
    tl.store(state + places, memory.to(state.dtype.element_ty), mask=square)

    mixed = tl.sum(memory * query[:, None], axis=0)
    mixed = mixed / tl.sqrt(tl.sum(mixed * mixed) / SIZE + norm_eps)
    mixed *= tl.load(norm_weight + channel, mask=inside, other=0.0).to(tl.float32)
    mixed *= tl.sigmoid(tl.load(output_gate + of_head, mask=inside, other=0.0).to(tl.float32))
    tl.store(output + of_head, mixed.to(output.dtype.element_ty), mask=inside)


def has_step_kernels(layer: Any, x: torch.Tensor) -> bool:
    """Whether ``kda_step`` can do the work of ``layer``: on a GPU, without gradients, and all its weights are there.

    The kernels read weights without calling the modules that own them. A module that is another than PyTorch's own
    (adapters, quantization), or has hooks (weights that are brought just in time), must be called.
    """
    linears = [layer.q_proj, layer.k_proj, layer.v_proj, *layer.f_proj, layer.b_proj, *layer.g_proj]
    modules = [*linears, layer.q_conv1d, layer.k_conv1d, layer.v_conv1d, layer.o_norm, layer.f_proj, layer.g_proj]
    return (
        x.is_cuda
        and not torch.is_grad_enabled()
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and layer.q_conv1d.weight.shape[-1] > 1
        and all(type(linear) is nn.Linear and type(linear.weight) is nn.Parameter for linear in linears)
        and all(linear.weight.dtype == x.dtype and linear.weight.is_contiguous() for linear in linears)
        and not any(
            module._forward_pre_hooks or module._forward_hooks or hasattr(module, "_hf_hook") for module in modules
        )
    )


def kda_step(layer: Any, x: torch.Tensor, conv_state: torch.Tensor, recurrent_state: torch.Tensor) -> torch.Tensor:
    """One token of each row through a KDA layer, up to its output projection; updates both states.

    Args:
        layer: a ``KimiDeltaAttention`` for which ``has_step_kernels``.
        x: ``[rows, 1, hidden_size]``.
        conv_state: ``[rows, conv_size - 1, channels of queries, keys and values]``.
        recurrent_state: ``[rows, heads, head_dim, head_dim]``.

    Returns: ``[rows, 1, heads * head_dim]``, in the dtype of ``x``.
    """
    attention = [layer.q_proj, layer.k_proj, layer.v_proj]
    return _step(
        x.contiguous(),
        conv_state,
        recurrent_state,
        [linear.weight for linear in attention],
        [linear.bias for linear in attention if linear.bias is not None],
        [convolution.weight for convolution in (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d)],
        [layer.f_proj[0].weight, layer.f_proj[1].weight, layer.A_log, layer.dt_bias, layer.b_proj.weight],
        [layer.g_proj[0].weight, layer.g_proj[1].weight, layer.g_proj[1].bias, layer.o_norm.weight],
        layer.head_dim,
        layer.gate_lower_bound,
        layer.o_norm.eps,
    )


@torch.library.custom_op("distillkit::kda_step", mutates_args=("conv_state", "recurrent_state"))
def _step(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    recurrent_state: torch.Tensor,
    attention: list[torch.Tensor],
    biases: list[torch.Tensor],
    taps: list[torch.Tensor],
    decay: list[torch.Tensor],
    gate: list[torch.Tensor],
    head_dim: int,
    lower_bound: float | None,
    norm_eps: float,
) -> torch.Tensor:
    """An operator of PyTorch's, for it says what it changes: torch.compile need not infer that from the kernels, and
    copies nothing else to be safe."""
    decay_weight, wide_decay_weight, A_log, dt_bias, beta_weight = decay
    gate_weight, wide_gate_weight, gate_bias, norm_weight = gate
    heads, kv_heads = len(attention[0]) // head_dim, len(attention[1]) // head_dim
    output = x.new_empty(len(x), 1, len(attention[0]))
    with torch.cuda.device_of(x):  # Triton starts kernels on the current one
        convolved, narrow_decay, narrow_gate, beta = _project(
            x, conv_state, attention, biases, taps, [decay_weight, gate_weight, beta_weight], head_dim
        )
        wide_decay, wide_gate = _widen(
            narrow_decay, narrow_gate, [wide_decay_weight, wide_gate_weight, gate_bias], head_dim
        )
        _delta_rule_kernel[(len(x) * heads,)](
            convolved,
            wide_decay,
            beta,
            wide_gate,
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
            num_warps=4,
        )
    return output


@_step.register_fake
def _(x: torch.Tensor, conv_state: torch.Tensor, recurrent_state: torch.Tensor, *others: Any) -> torch.Tensor:
    attention = others[0]
    return x.new_empty(len(x), 1, len(attention[0]))


def _project(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    attention: list[torch.Tensor],
    biases: list[torch.Tensor],
    taps: list[torch.Tensor],
    narrow: list[torch.Tensor],
    head_dim: int,
) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values after their convolution, ``[rows, channels]``, the first halves of the gates, beta."""
    rows, query_size, kv_size, heads = len(x), len(attention[0]), len(attention[1]), len(narrow[2])
    convolved = x.new_empty(rows, query_size + 2 * kv_size)
    decay, gate, beta = (x.new_empty(rows, len(weight)) for weight in narrow)
    block_hidden, blocks = 128 // x.itemsize, _blocks(rows)
    _projection_kernel[_grid(rows, query_size, kv_size, kv_size, head_dim, head_dim, heads)](
        x,
        *attention,
        *(biases or attention),
        *taps,
        *narrow,
        conv_state,
        convolved,
        decay,
        gate,
        beta,
        rows,
        query_size,
        kv_size,
        heads,
        HIDDEN=x.shape[-1],
        RANK=head_dim,
        TAPS=taps[0].shape[-1],
        BIAS=bool(biases),
        BLOCK_HIDDEN=block_hidden,
        num_warps=4,
        num_stages=_stages(x.device, sum(blocks.values()) * block_hidden * x.itemsize),
        **blocks,
    )
    return convolved, decay, gate, beta


def _widen(
    decay: torch.Tensor, gate: torch.Tensor, weights: list[torch.Tensor], head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gates of every channel, ``[rows, heads * head_dim]``, by their second halves and the bias of one."""
    rows, size = len(decay), len(weights[0])
    wide_decay, wide_gate = decay.new_empty(rows, size), gate.new_empty(rows, size)
    _gate_kernel[_grid(rows, size, size)](
        decay,
        gate,
        *weights,
        wide_decay,
        wide_gate,
        rows,
        size,
        RANK=head_dim,
        BLOCK_RANK=max(16, min(256 // decay.itemsize, triton.next_power_of_2(head_dim))),
        num_warps=4,
        **_blocks(rows),
    )
    return wide_decay, wide_gate


def _blocks(rows: int) -> dict[str, int]:
    """Channels and tokens that one program computes."""
    return {"C": 64, "T": min(64, max(16, triton.next_power_of_2(rows)))}


def _grid(rows: int, *sizes: int) -> tuple[int, int]:
    """Programs for so many tokens, and for the channels of weights that do not share a program."""
    blocks = _blocks(rows)
    return triton.cdiv(rows, blocks["T"]), sum(triton.cdiv(size, blocks["C"]) for size in sizes)


@functools.cache
def _stages(device: torch.device, bytes_of_one: int) -> int:
    """Blocks of a weight that are on their way at a time: as many as fit into a multiprocessor's memory, at most 8."""
    if device.type != "cuda":  # the interpreter
        return 1
    memory = triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    return max(1, min(8, memory // bytes_of_one - 1))
