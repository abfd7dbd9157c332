"""The student: a decoder of transformers whose attention is exchanged, layer by layer, for other mixers.

The teacher's architecture is built from its own configuration and keeps its parameter names; only ``self_attn`` of the
exchanged layers is another module, and the full-attention layers lose their rotary embedding unless the configuration
keeps it. So one class serves Llama, Arcee, Mistral, Qwen2, Qwen3 and every other decoder whose layers have
``self_attn`` with ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import MODEL_MAPPING, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration import KDAHybridConfig
from .documents import Documents
from .mixers import MIXERS, with_mixer_layers


class KDAHybridForCausalLM(PreTrainedModel, GenerationMixin):
    """Causal language model around a decoder with exchanged attention; loads, saves and generates as any other.

    Sequences may be padded on either side (2-D ``attention_mask``) or, without a mask and with ``use_cache=False``,
    packed (``position_ids`` that start anew with each document, or ``cu_seqlens`` with one row): no attention and no
    state crosses from one document to the next. A 2-D mask tells of padding alone, as everywhere in transformers.
    """

    config_class = KDAHybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict: ClassVar = [name for mixer in MIXERS.values() for name in mixer.float32]
    _is_stateful = True  # a recurrent state cannot be cropped: no assisted generation

    def __init__(self, config: KDAHybridConfig) -> None:
        super().__init__(config)
        base_config = config.base_config
        base_config._attn_implementation = config._attn_implementation
        self.model = MODEL_MAPPING[type(base_config)](base_config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._no_split_modules = self.model._no_split_modules
        exchange_attention(self.model, config)
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


def exchange_attention(decoder: Any, config: KDAHybridConfig) -> None:
    """Put the mixers that ``config.mixers`` names into the layers of ``decoder``."""
    for index, (layer, mixer) in enumerate(zip(decoder.layers, config.mixers, strict=True)):
        layer.self_attn = MIXERS[mixer].build(layer.self_attn, config, index)
    decoder.register_forward_pre_hook(_DecoderInputs(config), with_kwargs=True)


class _DecoderInputs:
    """Adds to a decoder's inputs what mixers need: document boundaries and a cache with layers of theirs."""

    def __init__(self, config: KDAHybridConfig) -> None:
        self.config = config

    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        inputs = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if inputs is None:
            raise TypeError("the decoder of a student takes its inputs by name: input_ids=… or inputs_embeds=…")
        kwargs = {**kwargs, **self._cache(decoder, kwargs)}
        cu_seqlens = kwargs.pop("cu_seqlens", None)
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        fresh = kwargs["past_key_values"] is None or kwargs["past_key_values"].get_seq_length() == 0
        if cu_seqlens is not None:
            if inputs.shape[0] != 1 or mask is not None:
                raise ValueError("cu_seqlens needs one row that holds all documents, and no attention_mask")
            kwargs["documents"] = Documents.from_boundaries(cu_seqlens.tolist(), inputs.device)
            kwargs["position_ids"] = kwargs["documents"].position_ids.unsqueeze(0)
        elif mask is not None and mask.dim() == 2:
            kwargs["documents"] = Documents.from_attention_mask(mask[:, -inputs.shape[1] :])
        elif mask is None and position_ids is not None and fresh:
            kwargs["documents"] = Documents.from_position_ids(position_ids.expand(inputs.shape[0], -1))
        packed = cu_seqlens is not None or (mask is None and kwargs.get("documents") is not None)
        if packed and kwargs["past_key_values"] is not None:
            # Full attention would not see the boundaries: transformers looks for packed documents without a cache only.
            raise ValueError("packed documents cannot be continued: pass use_cache=False")
        return args, kwargs

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
