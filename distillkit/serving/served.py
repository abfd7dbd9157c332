"""What a server needs to know of a student, from its configuration alone: its shapes, and whether it can be served."""

from dataclasses import dataclass

import torch
from transformers import MODEL_MAPPING

from distillkit.student.network.configuration import KDAHybridConfig, attention_types
from distillkit.student.network.kda_attention import KimiDeltaAttention

ARCHITECTURES = {
    "arcee": "ArceeForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""vLLM's own model of a teacher, by `model_type`. Everything of a student but its mixers is taken from it."""

HEAD_SIZES = (32, 64, 128, 256)
"""Of KDA layers: vLLM's kernels load whole powers of two, and read a neighbour's gate where a head is not one."""
CONV_SIZES = (2, 3, 4)
"""Taps that vLLM's kernel of the short convolution knows."""

PARAMETERS: dict[str, tuple[str, str | int | None]] = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "q_conv1d": ("conv1d", 0),
    "k_conv1d": ("conv1d", 1),
    "v_conv1d": ("conv1d", 2),
    "f_proj.0": ("gates_proj", 0),
    "g_proj.0": ("gates_proj", 1),
    "b_proj": ("gates_proj", 2),
    "f_proj.1": ("f_proj", None),
    "g_proj.1": ("g_proj", None),
}
"""Modules of a KDA layer that are parts of another one when it is served, and which part. Others keep their names."""


def served_parameter(name: str) -> tuple[str, str | int | None]:
    """The parameter of a served KDA layer, and the part of it, that a saved layer's parameter `name` becomes."""
    module, _, parameter = name.rpartition(".")
    if module not in PARAMETERS:
        return name, None
    served, part = PARAMETERS[module]
    return f"{served}.{parameter}", part


@dataclass(frozen=True)
class KDAShapes:
    """Of every KDA layer of a student, before tensor parallelism."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    conv_size: int
    qkv_bias: bool
    o_bias: bool

    @classmethod
    def of(cls, config: KDAHybridConfig) -> "KDAShapes":
        """As the network itself makes them: from the attention of the teacher's architecture, without memory."""
        with torch.device("meta"):
            attention = MODEL_MAPPING[type(config.base_config)](config.base_config).layers[0].self_attn
            layer = KimiDeltaAttention.in_place_of(attention, config, 0)
        return cls(
            hidden_size=layer.q_proj.in_features,
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            conv_size=config.conv_size,
            qkv_bias=layer.q_proj.bias is not None,
            o_bias=layer.o_proj.bias is not None,
        )

    @property
    def conv_channels(self) -> int:
        """Of queries, keys and values together."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def state_bytes(self) -> int:
        """What one sequence needs in each KDA layer, at any length: the state in float32, a few inputs in 16 bits."""
        return self.num_heads * self.head_dim**2 * 4 + (self.conv_size - 1) * self.conv_channels * 2


def sliding_windows(config: KDAHybridConfig) -> list[int | None]:
    """Tokens that each layer of full attention looks back on, `None` for all of them."""
    kinds = attention_types(config.base_config)
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def check_served(config: KDAHybridConfig, tensor_parallel_size: int = 1, *, speculative: bool = False) -> None:
    """Raises ValueError, in one line, for a student that vLLM would not compute as transformers does."""
    problem = _problem(config, tensor_parallel_size)
    if problem is None and speculative:
        problem = "speculative_config: a state cannot be taken back to before a refused token; serve without it"
    if problem is not None:
        raise ValueError(f"distillkit: vLLM cannot serve this student: {problem}")


def _problem(config: KDAHybridConfig, tensor_parallel_size: int) -> str | None:
    teacher = config.base_config.model_type
    if teacher not in ARCHITECTURES:
        return f"base_config.model_type: a student of {teacher!r}; those of {', '.join(ARCHITECTURES)} can be served"
    if unknown := sorted(set(config.mixers) - {"kda", "full"}):
        return f"mixers: {', '.join(unknown)}; layers of kda and full can be served"
    full = [
        kind for kind, mixer in zip(attention_types(config.base_config), config.mixers, strict=True) if mixer == "full"
    ]
    if unknown := sorted(set(full) - {"full_attention", "sliding_attention"}):
        return f"base_config.layer_types: {', '.join(unknown)}; full_attention and sliding_attention can be served"
    if "kda" not in config.mixers:
        return None
    shapes = KDAShapes.of(config)
    if shapes.head_dim not in HEAD_SIZES:
        return f"head_dim: KDA heads of {shapes.head_dim}; those of {', '.join(map(str, HEAD_SIZES))} can be served"
    if shapes.conv_size not in CONV_SIZES:
        return f"conv_size: {shapes.conv_size}; {', '.join(map(str, CONV_SIZES))} can be served"
    heads = {"num_attention_heads": shapes.num_heads, "num_key_value_heads": shapes.num_kv_heads}
    for name, count in heads.items():
        if count % tensor_parallel_size:
            return f"tensor_parallel_size: {tensor_parallel_size} does not divide {name} of KDA layers, {count}"
    return None
