"""Configuration of a student: the teacher's own configuration, and the mixer of each layer."""

from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from .mixers import MIXERS


class _OfBase:
    """A value of the base configuration, read and set as the student's own."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, config: Any, owner: type | None = None) -> Any:
        return self if config is None else getattr(config.base_config, self.name)

    def __set__(self, config: Any, value: Any) -> None:
        setattr(config.base_config, self.name, value)


class KDAHybridConfig(PretrainedConfig):
    """A decoder whose attention is another mixer, as Kimi Delta Attention, in some layers or in all of them.

    Args:
        base_config: configuration of the teacher (a dict with its ``model_type``, or the object). It decides everything
            that is not attention, and the full-attention layers.
        layer_types: one per layer, of transformers' names; follows from ``mixers`` and the base configuration, or
            without ``mixers`` decides them: ``"linear_attention"`` is KDA, any other full attention. A layer of full
            attention has the base's type (``"sliding_attention"``, …), whether it is called that or
            ``"full_attention"``.
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
        if (model_type := kwargs.get("model_type", self.model_type)) != self.model_type:
            raise ValueError(
                f"this is the configuration of a {model_type} model; distillkit convert makes it a student"
            )
        if base_config is None:
            base_config = {"model_type": "llama"}
        if isinstance(base_config, dict):
            base_config = CONFIG_MAPPING[base_config["model_type"]](**base_config)
        self.base_config: PretrainedConfig = base_config
        attention = attention_types(base_config)
        self.mixers = mixers or _mixers(layer_types or ["linear_attention"] * self.num_hidden_layers, attention)
        self.use_rope = use_rope
        self.kv_heads = kv_heads
        self.conv_size = conv_size
        self.gate_lower_bound = gate_lower_bound
        self._check()
        named = [MIXERS[mixer].layer_type for mixer in self.mixers]
        self.layer_types = [
            own if kind == "full_attention" else kind for kind, own in zip(named, attention, strict=True)
        ]
        if layer_types is not None and (
            len(layer_types) != len(named)
            or any(given not in either for given, *either in zip(layer_types, named, self.layer_types, strict=True))
        ):
            raise ValueError(f"layer_types: {layer_types} are not those of the mixers {self.mixers}")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
            kwargs.setdefault(name, getattr(base_config, name))
        super().__init__(**kwargs)

    def _check(self) -> None:
        if unknown := sorted(set(self.mixers) - set(MIXERS)):
            raise ValueError(f"mixers: {unknown} are none of {sorted(MIXERS)}")
        if len(self.mixers) != self.num_hidden_layers:
            raise ValueError(f"mixers or layer_types: {len(self.mixers)} entries for {self.num_hidden_layers} layers")
        if self.kv_heads not in ("expand", "grouped"):
            raise ValueError(f"kv_heads: {self.kv_heads!r} is neither 'expand' nor 'grouped'")
        if self.gate_lower_bound is not None and not -5 <= self.gate_lower_bound < 0:
            raise ValueError(f"gate_lower_bound: {self.gate_lower_bound} is not in [-5, 0), nor None")

    # Facts that transformers reads off any configuration, and users set on it; the base configuration alone holds them.
    vocab_size = _OfBase()
    hidden_size = _OfBase()
    num_hidden_layers = _OfBase()
    num_attention_heads = _OfBase()
    num_key_value_heads = _OfBase()
    head_dim = _OfBase()
    max_position_embeddings = _OfBase()
    sliding_window = _OfBase()
    attention_chunk_size = _OfBase()
    use_cache = _OfBase()


def attention_types(config: PretrainedConfig) -> list[str]:
    """What the full-attention layers of a base configuration attend to, one of transformers' names per layer.

    As transformers infers it where a configuration does not say: it decides how much a layer's cache keeps.
    """
    if (layer_types := getattr(config, "layer_types", None)) is not None:
        return list(layer_types)
    every = "full_attention"
    if getattr(config, "sliding_window", None) is not None:
        every = "sliding_attention"
    elif getattr(config, "attention_chunk_size", None) is not None:
        every = "chunked_attention"
    return [every] * config.num_hidden_layers


def _mixers(layer_types: list[str], attention: list[str]) -> list[str]:
    """Of students of earlier versions, which name no mixers."""
    if unknown := sorted(set(layer_types) - {"linear_attention", "full_attention", *attention}):
        raise ValueError(f"layer_types: {unknown} are neither 'linear_attention' nor 'full_attention'")
    return ["kda" if kind == "linear_attention" else "full" for kind in layer_types]
