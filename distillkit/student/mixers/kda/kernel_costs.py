"""What flash-linear-attention's kernels of a KDA layer keep and need, for planning where there is no CUDA device.

The sizes are those that fla 0.6.0 allocates (fla/ops/kda/chunk.py, chunk_fwd.py, chunk_bwd.py, chunk_intra.py and
fla/modules/causal_conv1d/ops.py): its forward pass keeps the normalised queries and keys, the values, both gates and
two matrices [64, 64] per chunk; its backward pass makes everything else again, unless the layer keeps that as well.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distillkit.student.network import KimiDeltaAttention

CHUNK = 64


def kda_flops(tokens: int, heads: int, head_dim: int) -> int:
    """Of a forward pass: per chunk five products with a [64, 64] matrix and three with the state [head, head]."""
    return tokens * heads * (10 * CHUNK * head_dim + 6 * head_dim**2)


def mix_as_kernels_do(kda: KimiDeltaAttention, count_flops: Callable[[int], None]) -> None:
    """Make a layer on the meta device allocate as on CUDA with fla; `count_flops` gets the kernels' operations."""

    def mix_heads(
        projected: list[Tensor],
        weights: list[Tensor],
        gates: list[Tensor],
        vectors: list[Tensor],
        documents: Any,
        cache: Any,
    ) -> Tensor:
        convolved = [_Convolution.apply(x, weight) for x, weight in zip(projected, weights, strict=True)]
        inputs = [each.contiguous() for each in (*kda._heads(convolved), *gates)]
        return _Kernel.apply(*inputs, *vectors, kda.keep_intermediates, count_flops)

    kda._mix_heads = mix_heads  # type: ignore[method-assign]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate: Tensor,
        beta: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        keep_intermediates: bool,
        count_flops: Callable[[int], None],
    ) -> Tensor:
        tokens, heads, head_dim = query.shape[0] * query.shape[1], query.shape[2], query.shape[3]
        ctx.flops = count_flops, kda_flops(tokens, heads, head_dim)
        count_flops(ctx.flops[1])
        normalised = [torch.empty_like(query), torch.empty_like(key)]
        norms = [torch.empty(query.shape[:-1], dtype=torch.float32) for _ in range(2)]
        sigmoid = torch.empty_like(beta, dtype=torch.float32)
        matrices = [query.new_empty(*query.shape[:-1], CHUNK) for _ in range(2)]
        # Alive until the end of the forward pass: decay, w, u, keys to the end of the chunk, states, new values.
        decay = torch.empty_like(gate, dtype=torch.float32)
        others = [torch.empty_like(each) for each in (key, value, key, value)]
        states = _states(query)
        output = torch.empty_like(value)
        kept = [decay, *others, torch.empty_like(query), states] if keep_intermediates else []
        del decay, others, states
        ctx.save_for_backward(*kept, *normalised, *norms, value, gate, beta, sigmoid, A_log, dt_bias, *matrices)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        *kept, query, key, _, _, value, gate, beta, _, A_log, dt_bias, matrix, _ = ctx.saved_tensors
        count_flops, flops = ctx.flops
        count_flops((2 if kept else 3) * flops)  # two products for each of the forward pass, part of which comes again
        again = kept or [
            torch.empty_like(gate, dtype=torch.float32),
            *(torch.empty_like(each) for each in (key, value, query, key, value)),
            _states(query),
        ]
        state_gradients = _states(query)
        matrix_gradients = [torch.empty_like(matrix, dtype=torch.float32) for _ in range(2)]
        wide = [torch.empty_like(each, dtype=torch.float32) for each in (query, key, gate)]
        value_gradients = [torch.empty_like(value) for _ in range(2)]
        intra = [torch.empty_like(each) for each in wide]
        del state_gradients, kept, again, wide, matrix_gradients
        narrow = [torch.empty_like(each) for each in (query, key, gate)]
        del intra
        gradients = (narrow[0], narrow[1], value_gradients[-1], narrow[2], torch.empty_like(beta))
        return *gradients, torch.empty_like(A_log), torch.empty_like(dt_bias), None, None


def _states(query: Tensor) -> Tensor:
    """The state at the start of every chunk of every head: [head_dim, head_dim] for each 64 tokens."""
    batch, tokens, heads, head_dim = query.shape
    return query.new_empty(batch, -(-tokens // CHUNK), heads, head_dim, head_dim)
