"""Configuration of a student: the teacher's own configuration, and the mixer of each layer."""

from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from .mixers import MIXERS

MIXER_OF = {"linear_attention": "kda", "full_attention": "full"}
"""The mixer of each layer type in configurations that name no mixers."""


class KDAHybridConfig(PretrainedConfig):
    """A decoder whose attention is another mixer, as Kimi Delta Attention, in some layers or in all of them.

    Args:
        base_config: configuration of the teacher (a dict with its ``model_type``, or the object). It decides everything
            that is not attention, and the full-attention layers.
        layer_types: one per layer, of transformers' names. Without ``mixers`` they decide: ``"linear_attention"`` is
            KDA, ``"full_attention"`` full attention.
        use_rope: whether full-attention layers keep the teacher's rotary embedding; without it they are NoPE.
        kv_heads: ``"expand"``, KDA layers have a key and value head for each query head; ``"grouped"``, they have the
            teacher's number of them and repeat their outputs.
        conv_size: taps of the short convolution of KDA layers.
        gate_lower_bound: lower bound of the logarithm of the decay (the safe gate); ``None`` for the plain gate.
        mixers: one per layer, of the names in ``mixers.MIXERS``: ``"kda"`` or ``"full"`` (full attention).
            ``layer_types`` follow from them.

    Raises:
        ValueError: where ``mixers``, ``layer_types`` and the number of layers disagree, or an option is not one of
            those above.
    """

    model_type = "kda_hybrid"
    sub_configs: ClassVar = {"base_config": AutoConfig}

    def __init__(
        self,
        base_config: dict | PretrainedConfig | None = None,
        layer_types: list[str] | None = None,
        use_rope: bool = False,
        kv_heads: str = "expand",
        conv_size: int = 4,
        gate_lower_bound: float | None = -5.0,
        mixers: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if base_config is None:
            base_config = {"model_type": "llama"}
        if isinstance(base_config, dict):
            base_config = CONFIG_MAPPING[base_config["model_type"]](**base_config)
        self.base_config: PretrainedConfig = base_config
        self.mixers = mixers or _mixers(layer_types or ["linear_attention"] * self.num_hidden_layers)
        self.layer_types = layer_types or [MIXERS[mixer].layer_type for mixer in self.mixers if mixer in MIXERS]
        self.use_rope = use_rope
        self.kv_heads = kv_heads
        self.conv_size = conv_size
        self.gate_lower_bound = gate_lower_bound
        self._check()
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
            kwargs.setdefault(name, getattr(base_config, name))
        super().__init__(**kwargs)

    def _check(self) -> None:
        if unknown := sorted(set(self.mixers) - set(MIXERS)):
            raise ValueError(f"mixers: {unknown} are none of {sorted(MIXERS)}")
        if len(self.mixers) != self.num_hidden_layers:
            raise ValueError(f"mixers or layer_types: {len(self.mixers)} entries for {self.num_hidden_layers} layers")
        if self.layer_types != [MIXERS[mixer].layer_type for mixer in self.mixers]:
            raise ValueError(f"layer_types: {self.layer_types} are not those of the mixers {self.mixers}")
        if self.kv_heads not in ("expand", "grouped"):
            raise ValueError(f"kv_heads: {self.kv_heads!r} is neither 'expand' nor 'grouped'")
        if self.gate_lower_bound is not None and not -5 <= self.gate_lower_bound < 0:
            raise ValueError(f"gate_lower_bound: {self.gate_lower_bound} is not in [-5, 0), nor None")

    # Facts that transformers reads off any configuration; the base configuration alone holds them.
    @property
    def vocab_size(self) -> int:
        return self.base_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.base_config.vocab_size = value

    @property
    def hidden_size(self) -> int:
        return self.base_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.base_config.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        return self.base_config.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        return self.base_config.num_key_value_heads

    @property
    def max_position_embeddings(self) -> int:
        return self.base_config.max_position_embeddings

    @property
    def use_cache(self) -> bool:
        return self.base_config.use_cache

    @use_cache.setter
    def use_cache(self, value: bool) -> None:
        self.base_config.use_cache = value


def _mixers(layer_types: list[str]) -> list[str]:
    if unknown := sorted(set(layer_types) - set(MIXER_OF)):
        raise ValueError(f"layer_types: {unknown} are neither 'linear_attention' nor 'full_attention'")
    return [MIXER_OF[layer_type] for layer_type in layer_types]
