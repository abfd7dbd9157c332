"""A KDA layer in vLLM: its projections, its states in vLLM's cache, and vLLM's kernels of the delta rule.

It computes what `KimiDeltaAttention` computes. vLLM's own layer (of Kimi Linear) knows only the gate without a lower
bound, no biases and no grouped heads. Here the gate is made before the kernels, which take its logarithm; under
`torch.compile` it becomes one kernel. Projections of the same input are one product: queries, keys and values; the
narrow halves of both gates and beta.
"""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fla.ops.kda import FusedRMSNormGated, chunk_kda, fused_recurrent_kda
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
    is_conv_state_dim_first,
)
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from vllm.model_executor.model_loader.weight_utils import default_weight_loader, sharded_weight_loader
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from distillkit.serving.served import KDAShapes, served_parameter
from distillkit.student.network.delta_rule import log_decay


class KDALayer(nn.Module, MambaBase):
    """Stands in the place of a decoder layer's `self_attn`.

    Args:
        shapes: of the whole layer; this process holds its share of the heads.
        gate_lower_bound: see `KDAHybridConfig`.
        prefix: name of the layer, by which vLLM finds its states.
    """

    kv_cache: tuple[torch.Tensor, ...]
    """Set by vLLM: what the convolution and the delta rule keep of each sequence, by its place in the cache."""

    def __init__(self, shapes: KDAShapes, gate_lower_bound: float | None, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.prefix, self.shapes, self.gate_lower_bound = prefix, shapes, gate_lower_bound
        self.state_dtypes = state_dtypes(vllm_config)
        self.processes, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        hidden, head_dim = shapes.hidden_size, shapes.head_dim
        key_dim, kv_dim = shapes.num_heads * head_dim, shapes.num_kv_heads * head_dim
        self.num_heads, self.num_kv_heads = shapes.num_heads // self.processes, shapes.num_kv_heads // self.processes
        self.own_heads = slice(rank * self.num_heads, (rank + 1) * self.num_heads)

        quant_config = vllm_config.quant_config
        self.qkv_proj = QKVParallelLinear(
            hidden,
            head_dim,
            shapes.num_heads,
            shapes.num_kv_heads,
            bias=shapes.qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.conv1d = MergedColumnParallelLinear(shapes.conv_size, [key_dim, kv_dim, kv_dim], bias=False)
        self.gates_proj = MergedColumnParallelLinear(
            hidden, [head_dim, head_dim, shapes.num_heads], bias=False, disable_tp=True
        )
        self.f_proj = ColumnParallelLinear(head_dim, key_dim, bias=False)
        self.g_proj = ColumnParallelLinear(head_dim, key_dim, bias=True)
        self.A_log = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads * head_dim, dtype=torch.float32))
        for parameter in (self.A_log, self.dt_bias):
            set_weight_attrs(parameter, {"weight_loader": sharded_weight_loader(0)})
        self.o_norm = FusedRMSNormGated(head_dim, eps=1e-5, activation="sigmoid")
        self.o_proj = RowParallelLinear(
            key_dim, hidden, bias=shapes.o_bias, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        vllm_config.compilation_config.static_forward_context[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """The backend that tells, for each step, which sequences begin, go on, and where their states are."""
        return MambaAttentionBackendEnum.GDN_ATTN

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return state_shapes(self.shapes, self.processes)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self.state_dtypes

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the parameters from those of a saved layer; returns the names of those filled."""
        parameters = dict(self.named_parameters())
        loaded = set()
        for name, weight in weights:
            served, part = served_parameter(name)
            if served not in parameters:
                raise ValueError(f"distillkit: {self.prefix}.{name} has no place in a KDA layer of this configuration")
            parameter = parameters[served]
            if "conv1d" in name:
                weight = weight.squeeze(1)
            loader = getattr(parameter, "weight_loader", default_weight_loader)
            loader(parameter, weight) if part is None else loader(parameter, weight, part)
            loaded.add(served)
        return loaded

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden_size]` → the same; a token's place in its sequence follows from the states alone."""
        head_dim = self.shapes.head_dim
        qkv, _ = self.qkv_proj(hidden_states)
        narrow, _ = self.gates_proj(hidden_states)
        decay, gate, beta = narrow.split([head_dim, head_dim, self.shapes.num_heads], dim=-1)
        decay = self.f_proj(decay)[0].unflatten(-1, (-1, head_dim))
        decay = log_decay(decay, self.A_log, self.dt_bias, self.gate_lower_bound)
        beta = beta[:, self.own_heads].float().sigmoid()
        gate = self.g_proj(gate)[0].unflatten(-1, (-1, head_dim))
        mixed = torch.zeros_like(gate)
        torch.ops.vllm.distillkit_kda(qkv, decay, beta, mixed, self.prefix)
        mixed = self.o_norm(mixed, gate)
        output, _ = self.o_proj(mixed.flatten(-2))
        return output

    def mix(self, qkv: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, mixed: torch.Tensor) -> None:
        """Convolution and delta rule over the step's tokens, sequence after sequence, decoding ones first.

        Args:
            qkv: `[tokens, channels]`, of which a decoding step overwrites the values.
            decay: `[tokens, heads, head_dim]`. beta: `[tokens, heads]`, both in float32.
            mixed: `[tokens, heads, head_dim]`, to be filled.
        """
        of_layers = get_forward_context().attn_metadata
        if of_layers is None:  # vLLM tries how much memory a step takes
            return self._ready_kernels(qkv)
        metadata = of_layers[self.prefix]
        tokens = metadata.num_actual_tokens
        query, key, value = self._heads(self._convolve(qkv[:tokens], metadata))
        inputs = [query, key, value, decay[:tokens].unsqueeze(0), beta[:tokens].unsqueeze(0)]
        _, states = self.kv_cache
        if metadata.num_prefills == 0:
            mixed[:tokens] = self._decode(inputs, states, metadata)
            return None
        decoding = metadata.num_decode_tokens
        if decoding > 0:
            mixed[:decoding] = self._decode([x[:, :decoding] for x in inputs], states, metadata)
        mixed[decoding:tokens] = self._prefill([x[:, decoding:] for x in inputs], states, metadata)
        return None

    def _convolve(self, qkv: torch.Tensor, metadata: GDNAttentionMetadata) -> torch.Tensor:
        conv_states, _ = self.kv_cache
        if not is_conv_state_dim_first():
            conv_states = conv_states.transpose(-1, -2)
        where = metadata.non_spec_state_indices_tensor
        if metadata.num_prefills == 0:
            return causal_conv1d_update(
                qkv,
                conv_states,
                self.conv1d.weight,
                activation="silu",
                conv_state_indices=where[: qkv.shape[0]],
                validate_data=True,
            )
        return causal_conv1d_fn(
            qkv.transpose(0, 1),
            self.conv1d.weight,
            None,
            activation="silu",
            conv_states=conv_states,
            has_initial_state=metadata.has_initial_state,
            cache_indices=where,
            query_start_loc=metadata.non_spec_query_start_loc,
            metadata=metadata,
        ).transpose(0, 1)

    def _heads(self, qkv: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys and values `[1, tokens, heads, head_dim]`; grouped keys and values are repeated."""
        heads = qkv.unflatten(-1, (-1, self.shapes.head_dim)).unsqueeze(0)
        query, key, value = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=-2)
        if self.num_kv_heads != self.num_heads:
            repeats = self.num_heads // self.num_kv_heads
            key, value = key.repeat_interleave(repeats, dim=-2), value.repeat_interleave(repeats, dim=-2)
        return [query.contiguous(), key.contiguous(), value.contiguous()]

    @staticmethod
    def _decode(inputs: list[torch.Tensor], states: torch.Tensor, metadata: GDNAttentionMetadata) -> torch.Tensor:
        """One token of each decoding sequence; the states are replaced where they are."""
        output, _ = fused_recurrent_kda(
            *inputs,
            initial_state=states,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=metadata.non_spec_query_start_loc[: metadata.num_decodes + 1],
            ssm_state_indices=metadata.non_spec_state_indices_tensor,
        )
        return output[0]

    @staticmethod
    def _prefill(inputs: list[torch.Tensor], states: torch.Tensor, metadata: GDNAttentionMetadata) -> torch.Tensor:
        """Prompts, or parts of them that go on from a state."""
        where = metadata.prefill_state_indices
        goes_on = metadata.prefill_has_initial_state[:, None, None, None]
        output, last = chunk_kda(
            *inputs,
            initial_state=torch.where(goes_on, states[where], 0),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=metadata.prefill_query_start_loc,
        )
        states[where] = last.to(states.dtype)
        return output[0]

    def _ready_kernels(self, qkv: torch.Tensor) -> None:
        """Have Triton choose among variants of its kernels while memory is free; the first layer does it for all."""
        key = (self.num_heads, self.shapes.head_dim, qkv.dtype)
        if key in _READY or not qkv.is_cuda:
            return
        _READY.add(key)
        head_dim = self.shapes.head_dim
        query = torch.randn(1, 64, self.num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
        chunk_kda(
            query,
            query.clone(),
            query.clone(),
            -torch.rand_like(query, dtype=torch.float32),
            torch.rand_like(query[..., 0], dtype=torch.float32),
            initial_state=query.new_zeros(1, self.num_heads, head_dim, head_dim, dtype=torch.float32),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=torch.tensor([0, 64], dtype=torch.int32, device=qkv.device),
        )


_READY: set[tuple] = set()


def state_shapes(shapes: KDAShapes, processes: int) -> tuple[tuple[int, ...], ...]:
    """What vLLM keeps of a sequence in each KDA layer of one process: inputs of the convolution, and the state."""
    return MambaStateShapeCalculator.kda_state_shape(
        processes,
        shapes.num_heads,
        shapes.head_dim,
        num_k_heads=shapes.num_kv_heads,
        conv_kernel_size=shapes.conv_size,
    )


def state_dtypes(vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
    return MambaStateDtypeCalculator.kda_state_dtype(
        vllm_config.model_config.dtype, vllm_config.cache_config.mamba_cache_dtype
    )


def _kda(qkv: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, mixed: torch.Tensor, layer_name: str) -> None:
    get_forward_context().no_compile_layers[layer_name].mix(qkv, decay, beta, mixed)


def _kda_shapes(
    qkv: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, mixed: torch.Tensor, layer_name: str
) -> None:
    return None


direct_register_custom_op(op_name="distillkit_kda", op_func=_kda, mutates_args=["mixed"], fake_impl=_kda_shapes)
