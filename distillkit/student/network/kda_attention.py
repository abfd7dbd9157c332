"""The Kimi Delta Attention layer (Kimi Linear, arXiv 2510.26692, section 4).

Parameters have the names and shapes of ``fla.layers.KimiDeltaAttention``, so weights load there and back. On CUDA with
flash-linear-attention installed its kernels do the work; anywhere else the PyTorch form of ``delta_rule`` does.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from .cache import RecurrentCacheLayer
from .delta_rule import chunk_kda, log_decay, recurrent_kda
from .documents import Documents
from .tuned_kernels import allow_tuned_kernels, use_tuned_kernels

try:
    if not torch.cuda.is_available():
        raise ImportError
    from .step_kernels import has_step_kernels, kda_step

    STEP_KERNELS = True
except ImportError:
    STEP_KERNELS = False

try:
    if not torch.cuda.is_available():
        raise ImportError
    allow_tuned_kernels()
    from fla import __version__ as fla_version
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.ops.kda import chunk_kda as fla_chunk_kda
    from fla.ops.kda import fused_recurrent_kda as fla_recurrent_kda

    FLA_AVAILABLE = True
except ImportError:
    FLA_AVAILABLE = False


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over ``conv_size`` tokens, then SiLU; ``weight`` is ``[channels, 1, conv_size]``.

    Those of queries, keys and values are computed together, so this module only gives its weight. It has to be called
    for it: what brings weights to a device just in time, or in shards, does so for modules that are called.
    """

    def __init__(self, channels: int, conv_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, conv_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As of a convolution of PyTorch."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self) -> torch.Tensor:
        """A copy of the weight, ``[channels, conv_size]``: the weight itself may be taken away after the call."""
        return self.weight.squeeze(1).clone()


class GatedRMSNorm(nn.Module):
    """RMSNorm over the last axis times the sigmoid of a gate, in float32."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        x = F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps)
        return x * torch.sigmoid(gate.to(dtype))


class KimiDeltaAttention(nn.Module):
    """Linear attention with a state of ``[heads, head_dim, head_dim]`` per sequence, whatever the length.

    Args:
        hidden_size: width of the residual stream.
        num_heads: query heads. num_kv_heads: key and value heads; fewer than ``num_heads`` means that their outputs are
            repeated.
        head_dim: size of a head.
        layer_idx: place of the layer in the decoder.
        conv_size, gate_lower_bound: see ``KDAHybridConfig``.
        qkv_bias, o_bias: biases of the projections, for teachers that have them.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        layer_idx: int,
        conv_size: int = 4,
        gate_lower_bound: float | None = -5.0,
        qkv_bias: bool = False,
        o_bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.layer_idx = layer_idx
        self.gate_lower_bound = gate_lower_bound
        self.keep_intermediates = False
        """Keep what fla's kernels would make again in the backward pass; for layers that are checkpointed anyway."""
        key_dim, kv_dim = num_heads * head_dim, num_kv_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, key_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv_dim, bias=qkv_bias)
        self.q_conv1d = ShortConvolution(key_dim, conv_size)
        self.k_conv1d = ShortConvolution(kv_dim, conv_size)
        self.v_conv1d = ShortConvolution(kv_dim, conv_size)
        self.f_proj = nn.Sequential(
            nn.Linear(hidden_size, head_dim, bias=False), nn.Linear(head_dim, key_dim, bias=False)
        )
        self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(num_heads))
        self.dt_bias = nn.Parameter(torch.zeros(key_dim))
        self.g_proj = nn.Sequential(
            nn.Linear(hidden_size, head_dim, bias=False), nn.Linear(head_dim, key_dim, bias=True)
        )
        self.o_norm = GatedRMSNorm(head_dim)
        self.o_proj = nn.Linear(key_dim, hidden_size, bias=o_bias)

    def reset_parameters(self) -> None:
        """Those that are in no module of its own."""
        nn.init.zeros_(self.A_log)
        nn.init.zeros_(self.dt_bias)

    @classmethod
    def in_place_of(cls, attention: Any, config: Any, layer_idx: int) -> "KimiDeltaAttention":
        """A layer, not initialised, with the heads and biases of the teacher's ``attention``.

        ``config`` is the student's. The attention must have linear ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``.
        """
        num_heads = attention.q_proj.out_features // attention.head_dim
        grouped = config.kv_heads == "grouped"
        return cls(
            hidden_size=attention.q_proj.in_features,
            num_heads=num_heads,
            num_kv_heads=attention.k_proj.out_features // attention.head_dim if grouped else num_heads,
            head_dim=attention.head_dim,
            layer_idx=layer_idx,
            conv_size=config.conv_size,
            gate_lower_bound=config.gate_lower_bound,
            qkv_bias=attention.q_proj.bias is not None,
            o_bias=attention.o_proj.bias is not None,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        documents: Documents | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Mix tokens along the sequence.

        Args:
            hidden_states: ``[batch, tokens, hidden_size]``.
            documents: where sequences start and end; without it each row is one.
            past_key_values: a cache whose layer ``layer_idx`` is a ``RecurrentCacheLayer``; read and updated.
            kwargs: what decoders hand to softmax attention (masks, positions); not needed here.

        Returns: the output ``[batch, tokens, hidden_size]``, and ``None`` for attention weights.
        """
        batch, tokens, _ = hidden_states.shape
        cache = None
        if past_key_values is not None:
            cache = past_key_values.layers[self.layer_idx]
            if not isinstance(cache, RecurrentCacheLayer):
                raise TypeError(f"layer {self.layer_idx} of the cache is {cache}, not a RecurrentCacheLayer")
            if cache.record_past:
                cache.record(tokens, functools.partial(self._again, hidden_states, documents, past_key_values))
        if documents is not None:
            hidden_states = documents.flatten(hidden_states)
        output = hidden_states
        if cache is not None and cache.is_initialized and documents is None and tokens == 1:
            output = self.o_proj(self._step(hidden_states, cache))
        elif hidden_states.shape[1] > 0:  # else all is padding, and the state stays as it is
            output = self._mix(hidden_states, documents, cache)
            gate = self.g_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
            output = self.o_norm(output, gate).flatten(-2)
            output = self.o_proj(output.to(hidden_states.dtype))
        if documents is not None:
            output = documents.restore(output, batch, tokens)
        if cache is not None:
            cache.count(tokens)
        return output, None

    def _again(self, hidden_states: torch.Tensor, documents: Documents | None, cache: Cache, tokens: int) -> None:
        """An earlier call, with its first ``tokens`` alone."""
        part = None if documents is None else documents.first(tokens, *hidden_states.shape[:2])
        self(hidden_states[:, :tokens], part, cache)

    def _mix(self, x: torch.Tensor, documents: Documents | None, cache: RecurrentCacheLayer | None) -> torch.Tensor:
        """``[batch, tokens, hidden_size]`` → ``[batch, tokens, heads, head_dim]``."""
        projected = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        weights = [self.q_conv1d(), self.k_conv1d(), self.v_conv1d()]
        gates = [self.f_proj(x).unflatten(-1, (-1, self.head_dim)), self.b_proj(x)]
        return self._mix_heads(projected, weights, gates, [self.A_log, self.dt_bias], documents, cache)

    def _mix_heads(
        self,
        projected: list[torch.Tensor],
        weights: list[torch.Tensor],
        gates: list[torch.Tensor],
        vectors: list[torch.Tensor],
        documents: Documents | None,
        cache: RecurrentCacheLayer | None,
    ) -> torch.Tensor:
        """All in which tokens meet, for some heads or all.

        Args:
            projected: queries, keys and values, ``[batch, tokens, channels]``.
            weights: of their convolutions, ``[channels, conv_size]``.
            gates: of the decay, ``[batch, tokens, heads, head_dim]``, and beta's, ``[batch, tokens, heads]``, both raw.
            vectors: ``A_log`` and ``dt_bias``.

        Returns: ``[batch, tokens, heads, head_dim]``.
        """
        kernels = FLA_AVAILABLE and projected[0].is_cuda
        conv_state = None
        if kernels and cache is None:
            convolved = _convolve_with_kernels(projected, weights, documents)
        else:
            conv_state = None if cache is None else cache.conv_state
            joined, conv_state = short_convolution(
                torch.cat(projected, dim=-1), torch.cat(weights), conv_state, documents
            )
            convolved = list(joined.split([each.shape[-1] for each in projected], dim=-1))
        inputs = [*self._heads(convolved), *gates]
        state = None if cache is None else cache.recurrent_state
        attend = self._attend_with_kernels if kernels else self._attend
        output, state = attend(inputs, vectors, state, documents, cache is not None)
        if cache is not None and conv_state is not None:
            cache.store(conv_state, state)
        return output

    def _step(self, x: torch.Tensor, cache: RecurrentCacheLayer) -> torch.Tensor:
        """One token more, ``[batch, 1, hidden_size]`` → ``[batch, 1, heads * head_dim]``; all in one graph."""
        if STEP_KERNELS and has_step_kernels(self, x):
            return kda_step(self, x, cache.conv_state, cache.recurrent_state)
        projected = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        weights = [self.q_conv1d(), self.k_conv1d(), self.v_conv1d()]
        joined, conv_state = convolution_step(torch.cat(projected, dim=-1), torch.cat(weights), cache.conv_state)
        query, key, value = self._heads(joined.split([each.shape[-1] for each in projected], dim=-1))
        decay_gate, gate = (each(x).unflatten(-1, (-1, self.head_dim)) for each in (self.f_proj, self.g_proj))
        decay = log_decay(decay_gate, self.A_log, self.dt_bias, self.gate_lower_bound)
        beta = self.b_proj(x).to(decay.dtype).sigmoid()
        output, state = recurrent_kda(query, key, value, decay, beta, cache.recurrent_state)
        cache.store(conv_state, state)
        return self.o_norm(output, gate).flatten(-2).to(x.dtype)

    def _heads(self, convolved: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Queries, keys and values, ``[batch, tokens, heads, head_dim]``, those of grouped heads repeated."""
        query, key, value = (each.unflatten(-1, (-1, self.head_dim)) for each in convolved)
        repeats = query.shape[-2] // key.shape[-2]
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, dim=-2), value.repeat_interleave(repeats, dim=-2)
        return [query, key, value]

    @torch.compiler.disable  # every set of documents would be another graph
    def _attend(
        self,
        inputs: list[torch.Tensor],
        vectors: list[torch.Tensor],
        state: torch.Tensor | None,
        documents: Documents | None,
        keep_state: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value, decay_gate, beta_gate = inputs
        decay = log_decay(decay_gate, vectors[0], vectors[1], self.gate_lower_bound)
        beta = beta_gate.to(decay.dtype).sigmoid()
        return chunk_kda(query, key, value, decay, beta, state, documents)

    @torch.compiler.disable
    def _attend_with_kernels(
        self,
        inputs: list[torch.Tensor],
        vectors: list[torch.Tensor],
        state: torch.Tensor | None,
        documents: Documents | None,
        keep_state: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _ready_kernels()
        options = {
            "A_log": vectors[0],
            "dt_bias": vectors[1],
            "initial_state": state,
            "output_final_state": keep_state,
            "use_qk_l2norm_in_kernel": True,
            "use_gate_in_kernel": True,
            "use_beta_sigmoid_in_kernel": True,
            "lower_bound": self.gate_lower_bound,
            "cu_seqlens": None if documents is None else documents.cu_seqlens,
        }
        inputs = [x.contiguous() for x in inputs]
        if keep_state and inputs[0].shape[1] <= 64 and not torch.is_grad_enabled():
            return fla_recurrent_kda(*inputs, **options)
        return fla_chunk_kda(
            *inputs,
            safe_gate=self.gate_lower_bound is not None,
            disable_recompute=self.keep_intermediates,
            **options,
        )


@functools.cache
def _ready_kernels() -> None:
    """Once, before the first call of a kernel of fla's."""
    use_tuned_kernels(torch.cuda.get_device_name(), fla_version)


@torch.compiler.disable
def _convolve_with_kernels(
    projected: list[torch.Tensor], weights: list[torch.Tensor], documents: Documents | None
) -> list[torch.Tensor]:
    """Queries, keys and values each by themselves: joined, they would be copied once to join and once to part."""
    _ready_kernels()
    cu_seqlens = None if documents is None else documents.cu_seqlens
    return [
        causal_conv1d(x, weight, activation="silu", cu_seqlens=cu_seqlens)[0]
        for x, weight in zip(projected, weights, strict=True)
    ]


@torch.compiler.disable
def short_convolution(
    x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor | None, documents: Documents | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal depthwise convolution and SiLU; no document sees another's tokens.

    Args:
        x: ``[batch, tokens, channels]``. weight: ``[channels, conv_size]``, the last tap on the token itself.
        state: ``[documents, conv_size - 1, channels]``, the inputs before the first token; zeros if not given.
        documents: without it each row is one document.

    Returns: the output, shaped as ``x``, and the new state.
    """
    batch, tokens, channels = x.shape
    taps = weight.shape[-1]
    weight = weight.to(x.dtype)
    count = batch if documents is None else documents.count
    if state is None:
        state = x.new_zeros(count, taps - 1, channels)
    if documents is None:
        padded = torch.cat([state, x], dim=1)
        output = F.conv1d(padded.transpose(1, 2), weight.unsqueeze(1), groups=channels).transpose(1, 2)
        return F.silu(output), padded[:, tokens:].clone()  # a view would keep the whole sequence alive
    # Each document follows the inputs that came before it: its state.
    document = torch.arange(count, device=x.device).repeat_interleave(documents.cu_seqlens.diff())
    places = torch.arange(tokens, device=x.device) + (document + 1) * (taps - 1)
    ends = documents.cu_seqlens[1:] + torch.arange(1, count + 1, device=x.device) * (taps - 1)
    window = torch.arange(taps - 1, device=x.device)
    state_places = (documents.cu_seqlens[:-1] + torch.arange(count, device=x.device) * (taps - 1)).unsqueeze(1) + window
    padded = x.new_zeros(tokens + count * (taps - 1), channels)
    padded = padded.index_copy(0, state_places.flatten(), state.flatten(0, 1)).index_copy(0, places, x.squeeze(0))
    output = F.conv1d(padded.t().unsqueeze(0), weight.unsqueeze(1), groups=channels).squeeze(0).t()
    output = output.index_select(0, places - (taps - 1)).unsqueeze(0)
    return F.silu(output), padded[ends.unsqueeze(1) - (taps - 1) + window]


def convolution_step(x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``short_convolution`` of one token, ``[batch, 1, channels]``: conv1d takes far longer to start."""
    window = torch.cat([state, x], dim=1)
    dtype = torch.promote_types(x.dtype, torch.float32)  # a convolution adds up unrounded products, too
    output = (window.to(dtype) * weight.t().to(dtype)).sum(1, keepdim=True)
    return F.silu(output.to(x.dtype)), window[:, 1:].clone()
