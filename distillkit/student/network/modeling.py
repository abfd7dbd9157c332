"""The student: a decoder of transformers whose attention is exchanged, layer by layer, for other mixers.

The teacher's architecture is built from its own configuration and keeps its parameter names; only ``self_attn`` of the
exchanged layers is another module, and the full-attention layers lose their rotary embedding unless the configuration
keeps it. So one class serves Llama, Arcee, Mistral, Qwen2, Qwen3 and every other decoder whose layers have
``self_attn`` with ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``.
"""

import copy
import inspect
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import MODEL_MAPPING, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration import KDAHybridConfig
from .documents import Documents
from .full_attention import forget_positions
from .mixers import MIXERS, with_mixer_layers


class KDAHybridPreTrainedModel(PreTrainedModel):
    """What a student's decoder and its causal language model share."""

    config_class = KDAHybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict: ClassVar = [name for mixer in MIXERS.values() for name in mixer.float32]

    def __init__(self, config: KDAHybridConfig) -> None:
        super().__init__(config)
        base_config = config.base_config
        base_config._attn_implementation = config._attn_implementation
        self.model = MODEL_MAPPING[type(base_config)](base_config)
        self._no_split_modules = self.model._no_split_modules

    def _exchange(self, config: KDAHybridConfig) -> None:
        """The last step of ``__init__``."""
        exchange_attention(self.model, config)
        self.model._tp_plan = _tensor_parallel_plan(self.model, config)
        self.model._fsdp_plan |= _own_shards(self.model, config)
        self.post_init()

    @init.guard_torch_init_functions()
    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Also what the decoder's class does not know: modules of mixers that have PyTorch's ``reset_parameters``.

        What was initialised or loaded before stays as it is.
        """
        for layer in self.model.layers:
            for module in layer.self_attn.modules():
                known = isinstance(module, nn.Linear) or getattr(module, "_is_hf_initialized", False)
                if hasattr(module, "reset_parameters") and not known:
                    module.reset_parameters()
        super().initialize_weights()


class KDAHybridModel(KDAHybridPreTrainedModel):
    """A student's decoder: what ``AutoModel`` makes of its files."""

    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^lm_head\."]

    def __init__(self, config: KDAHybridConfig) -> None:
        super().__init__(config)
        self._exchange(config)

    def forward(self, input_ids: torch.LongTensor | None = None, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        """As any decoder of transformers; ``cu_seqlens`` gives document boundaries."""
        return self.model(input_ids, *args, **kwargs)


class KDAHybridForCausalLM(KDAHybridPreTrainedModel, GenerationMixin):
    """Causal language model around a decoder with exchanged attention; loads, saves and generates as any other.

    Sequences may be padded on either side (2-D ``attention_mask``) or, without a mask and with ``use_cache=False``,
    packed (``position_ids`` that restart at 0 with each document, or ``cu_seqlens`` with one row): no attention and no
    state crosses from one document to the next. A 2-D mask tells of padding alone, as everywhere in transformers.
    """

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar = {"lm_head": "colwise_gather_output"}
    _fsdp_plan: ClassVar = {"lm_head": "keep_full_weight"}
    _reads_prompt = False

    def __init__(self, config: KDAHybridConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._exchange(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As any causal language model of transformers; ``cu_seqlens`` among ``kwargs`` gives document boundaries."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if model_kwargs.get("past_key_values") is not None:
            with_mixer_layers(model_kwargs["past_key_values"], self.config.mixers)
        return result

    def create_masks_for_generate(
        self, config: KDAHybridConfig, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any
    ) -> Any:
        """Ahead of a step of a static cache, which is one graph, what full attention takes; else the decoder makes it.

        Other mixers take the mask of a prompt for its padding. A step has none.
        """
        if self._reads_prompt or inputs_embeds.shape[1] > 1:
            return attention_mask
        if all(MIXERS[mixer].layer_type == "linear_attention" for mixer in config.mixers):
            return None
        return create_masks_for_generate(config.base_config, inputs_embeds, attention_mask, **kwargs)

    def _prefill(self, input_ids: torch.Tensor, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        """A prompt is read as it is, in pieces, too: its padding, its kernels and new states are in no graph."""
        eager = copy.copy(generation_config)
        eager.disable_compile = True
        self._reads_prompt = True
        try:
            return super()._prefill(input_ids, eager, *args, **kwargs)
        finally:
            self._reads_prompt = False


def exchange_attention(decoder: Any, config: KDAHybridConfig) -> None:
    """Put the mixers that ``config.mixers`` names into the layers of ``decoder``."""
    if len(config.mixers) != len(decoder.layers):
        raise ValueError(f"num_hidden_layers: {len(decoder.layers)} layers, and {len(config.mixers)} mixers for them")
    for index, (layer, mixer) in enumerate(zip(decoder.layers, config.mixers, strict=True)):
        layer.self_attn = MIXERS[mixer].build(layer.self_attn, config, index)
    if not config.use_rope:
        forget_positions(decoder.rotary_emb)
    decoder.register_forward_pre_hook(_DecoderInputs(decoder, config), with_kwargs=True)


def _tensor_parallel_plan(decoder: Any, config: KDAHybridConfig) -> dict[str, str]:
    """The teacher's, with all attention whole on each device where layers have other mixers.

    A plan has one entry for the layers of all kinds, and what is written of attention would cut other mixers apart.
    """
    if not _linear(config):
        return decoder._tp_plan
    return {name: style for name, style in decoder._tp_plan.items() if ".self_attn" not in name}


def _own_shards(decoder: Any, config: KDAHybridConfig) -> dict[str, str]:
    """Of FSDP2, whose shards have one dtype each: those of the modules beside parameters that stay in float32."""
    return {
        f"layers.*.self_attn.{name}": "free_full_weight"
        for layer, mixer in zip(decoder.layers, config.mixers, strict=True)
        if MIXERS[mixer].float32
        for name, _ in layer.self_attn.named_children()
    }


def _linear(config: KDAHybridConfig) -> bool:
    """Whether any layer is not of full attention."""
    return any(MIXERS[mixer].layer_type == "linear_attention" for mixer in config.mixers)


class _DecoderInputs:
    """Makes of a decoder's inputs what mixers need: document boundaries and a cache with layers of theirs."""

    def __init__(self, decoder: nn.Module, config: KDAHybridConfig) -> None:
        self.config = config
        self.linear = _linear(config)
        self.signature = inspect.signature(decoder.forward)

    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            kwargs = {**self.signature.bind_partial(*args).arguments, **kwargs}
        inputs = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if inputs is None:
            raise ValueError("a decoder needs input_ids or inputs_embeds")
        kwargs = {**self._asked_for(), **kwargs, **self._cache(decoder, kwargs)}
        cu_seqlens = kwargs.pop("cu_seqlens", None)
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if inputs.shape[1] == 1 and cu_seqlens is None and _is_of_a_step(mask, kwargs["past_key_values"]):
            return (), kwargs
        seen = 0 if kwargs["past_key_values"] is None else kwargs["past_key_values"].get_seq_length()
        if cu_seqlens is not None:
            if inputs.shape[0] != 1 or mask is not None:
                raise ValueError("cu_seqlens needs one row that holds all documents, and no attention_mask")
            kwargs["documents"] = Documents.from_boundaries(cu_seqlens.tolist(), inputs.device)
            kwargs["position_ids"] = kwargs["documents"].position_ids.unsqueeze(0)
        elif mask is not None and self.linear:
            kwargs["documents"] = Documents.from_attention_mask(_of_new_tokens(mask, seen, inputs.shape[1]))
        elif mask is None and position_ids is not None and seen == 0:
            kwargs["documents"] = Documents.from_position_ids(position_ids.expand(inputs.shape[0], -1))
        packed = cu_seqlens is not None or (mask is None and kwargs.get("documents") is not None)
        if packed and kwargs["past_key_values"] is not None:
            # Full attention would not see the boundaries: transformers looks for packed documents without a cache only.
            raise ValueError("packed documents cannot be continued: pass use_cache=False")
        return (), kwargs

    def _asked_for(self) -> dict[str, bool]:
        """Outputs that the student's configuration asks for; the decoder looks at the base configuration alone."""
        return {name: True for name in ("output_hidden_states", "output_attentions") if getattr(self.config, name)}

    def _cache(self, decoder: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        checkpointing = decoder.training and decoder.gradient_checkpointing
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = self.config.use_cache and not decoder.training
        cache = kwargs.get("past_key_values")
        if use_cache and cache is None and not checkpointing:
            cache = DynamicCache(config=self.config)
        if cache is not None:
            with_mixer_layers(cache, self.config.mixers)
        return {"use_cache": use_cache and not checkpointing, "past_key_values": cache}


def _is_of_a_step(mask: Any, cache: Cache | None) -> bool:
    """Whether there is no padding to know of: no mask, or one made ahead of a step of a static cache.

    Such a mask hides padding and unused places of the cache from full attention, never the new token.
    """
    return mask is None or (isinstance(cache, StaticCache) and (isinstance(mask, dict) or mask.dim() == 4))


def _of_new_tokens(mask: Any, seen: int, tokens: int) -> torch.Tensor:
    """The part of a mask for padding that is of the tokens behind those ``seen``, ``[batch, tokens]``.

    Raises ValueError for any other mask: full attention alone could keep to it.
    """
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.shape[1] < seen + tokens:
        shape = list(getattr(mask, "shape", [])) or type(mask).__name__
        raise ValueError(
            f"attention_mask: a student with linear attention takes a mask of padding, [batch, {int(seen + tokens)}], "
            f"not {shape}; for packed documents pass position_ids or cu_seqlens in place of a mask"
        )
    if torch.compiler.is_exporting():
        raise ValueError("attention_mask: padding cannot be exported; export without a mask")
    return mask[:, seen : seen + tokens]
