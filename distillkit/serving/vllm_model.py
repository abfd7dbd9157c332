"""A student in vLLM: vLLM's own model of the teacher's architecture, its attention exchanged layer by layer.

As in transformers (`distillkit.student.network.modeling`), everything but the mixers is the teacher's: embedding, MLPs,
norms, head, their kernels and their tensor parallelism. A layer's `self_attn` becomes a `KDALayer`, or stays and loses
its rotary embedding.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, MambaStateCopyFuncCalculator
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.sequence import IntermediateTensors

from distillkit.serving.served import ARCHITECTURES, KDAShapes, check_served, sliding_windows
from distillkit.serving.vllm_layer import KDALayer, state_dtypes, state_shapes
from distillkit.student.network.configuration import KDAHybridConfig, attention_types

Weights = Iterable[tuple[str, torch.Tensor]]


class KDAHybridForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """What vLLM loads for a student's folder; called and asked for by vLLM alone."""

    packed_modules_mapping = {  # noqa: RUF012  vLLM's name
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config: KDAHybridConfig = vllm_config.model_config.hf_config
        check_served(self.config, vllm_config.parallel_config.tensor_parallel_size)
        self.teacher = initialize_model(vllm_config=_of_teacher(vllm_config, self.config), prefix=prefix)
        shapes = KDAShapes.of(self.config)
        windows = sliding_windows(self.config)
        for index, mixer in enumerate(self.config.mixers):
            layer, name = self.teacher.model.layers[index], f"{prefix}.model.layers.{index}.self_attn".lstrip(".")
            if mixer == "kda":
                vllm_config.compilation_config.static_forward_context.pop(layer.self_attn.attn.layer_name)
                layer.self_attn = KDALayer(shapes, self.config.gate_lower_bound, vllm_config, name)
                continue
            window = layer.self_attn.attn.sliding_window
            if window != windows[index]:
                raise ValueError(
                    f"distillkit: vLLM cannot serve this student: layer {index} looks back on "
                    f"{windows[index] or 'all'} tokens, in vLLM's {type(self.teacher).__name__} on {window or 'all'}"
                )
            if not self.config.use_rope:
                layer.self_attn.rotary_emb = AtPositionZero(layer.self_attn.rotary_emb)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.teacher.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.teacher(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.teacher.compute_logits(hidden_states)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        shapes = KDAShapes.of(vllm_config.model_config.hf_config)
        return state_shapes(shapes, vllm_config.parallel_config.tensor_parallel_size)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return state_dtypes(vllm_config)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, ...]:
        return MambaStateCopyFuncCalculator.kda_state_copy_func()

    def load_weights(self, weights: Weights) -> set[str]:
        """The weights of a saved student; returns the names of the parameters filled, which vLLM holds to its own."""
        loaded: set[str] = set()
        others = self.teacher.load_weights(self._without_kda(weights, loaded))
        return loaded | {f"teacher.{name}" for name in others}

    def _without_kda(self, weights: Weights, loaded: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """What is of the teacher's architecture; on the way, fills the KDA layers and adds their names to `loaded`."""
        parameters = {name for name, _ in self.teacher.named_parameters(remove_duplicate=False)}
        for name, weight in weights:
            parts = name.split(".", 4)
            if (
                parts[:2] == ["model", "layers"]
                and parts[3] == "self_attn"
                and self.config.mixers[int(parts[2])] == "kda"
            ):
                layer = self.teacher.model.layers[int(parts[2])].self_attn
                place = ".".join(["teacher", *parts[:4]])
                loaded |= {f"{place}.{filled}" for filled in layer.load_weights([(parts[4], weight)])}
                continue
            # vLLM's models pass over biases that they do not have.
            if name.endswith(".bias") and self._served(name) not in parameters:
                raise ValueError(
                    f"distillkit: vLLM cannot serve this student: {name} has no place in vLLM's "
                    f"{type(self.teacher).__name__}"
                )
            yield name, weight

    def _served(self, name: str) -> str:
        for packed, parts in self.packed_modules_mapping.items():
            for part in parts if packed in getattr(self.teacher, "packed_modules_mapping", {}) else ():
                name = name.replace(f".{part}.", f".{packed}.")
        return name


def _of_teacher(vllm_config: VllmConfig, config: KDAHybridConfig) -> VllmConfig:
    """The configuration of vLLM's model of the teacher, with what the student decides over it."""
    base = copy.deepcopy(config.base_config)
    base.tie_word_embeddings = config.tie_word_embeddings
    base.layer_types = attention_types(base)
    # vLLM keeps compiled graphs by their configuration, and those of a student are not its teacher's.
    base.student = {"mixers": config.mixers, "use_rope": config.use_rope, "kv_heads": config.kv_heads}
    base.student |= {"conv_size": config.conv_size, "gate_lower_bound": config.gate_lower_bound}
    inner = vllm_config.with_hf_config(base, architectures=[ARCHITECTURES[base.model_type]])
    inner.model_config.hf_text_config = inner.model_config.hf_config
    return inner


class AtPositionZero(nn.Module):
    """A rotary embedding asked for position 0 whatever the position: none, or the scaling of it (YaRN)."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.rotary = rotary
        first = rotary.cos_sin_cache[0]
        cos, sin = first.float().chunk(2)
        self.is_identity = not first.is_meta and bool((cos == 1).all() and (sin == 0).all())

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_identity:
            return query, key
        return self.rotary(torch.zeros_like(positions), query, key)
