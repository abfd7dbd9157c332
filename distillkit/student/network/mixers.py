"""The mixers that a layer of the student may have in place of its attention, by the names ``config.mixers`` gives them.

A mixer mixes tokens along a sequence. It is called as the ``self_attn`` of a decoder layer of transformers is, with
``documents`` (``Documents``, or none) among the keyword arguments, and returns ``(output, attention weights or None)``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, StaticCache

from .cache import RecurrentCacheLayer
from .full_attention import keep_full_attention
from .kda_attention import KimiDeltaAttention


@dataclass(frozen=True)
class LayerMixer:
    """How the network makes one kind of mixer.

    layer_type: of transformers' names for layers; decides the attention mask and, by default, the cache layer.
    build: from (the teacher's attention, ``KDAHybridConfig``, index of the layer), the module that stands in its place.
    cache_layer: what it remembers between two calls, where that is not what transformers has for ``layer_type``.
    float32: names of parameters that stay in float32 when a model is loaded in a narrower dtype.
    """

    layer_type: str
    build: Callable[[nn.Module, Any, int], nn.Module]
    cache_layer: type[RecurrentCacheLayer] | None = None
    float32: tuple[str, ...] = ()


MIXERS: dict[str, LayerMixer] = {
    "kda": LayerMixer(
        "linear_attention",
        KimiDeltaAttention.in_place_of,
        RecurrentCacheLayer,
        float32=("A_log", "dt_bias"),  # their exponentials are the memory of a head
    ),
    "full": LayerMixer("full_attention", keep_full_attention),
}


def with_mixer_layers(cache: Cache, mixers: list[str]) -> Cache:
    """Put the cache layers of ``mixers`` into ``cache`` where it has others; returns ``cache``.

    Raises ValueError where one of those others holds something: it is another model's cache.
    """
    while len(cache.layers) < len(mixers):  # a DynamicCache made without a config adds its layers as they come
        cache.layers.append(cache.layer_class_to_replicate())
    for index, mixer in enumerate(mixers):
        cache_layer, other = MIXERS[mixer].cache_layer, cache.layers[index]
        if cache_layer is None and isinstance(other, RecurrentCacheLayer):
            raise ValueError(f"past_key_values: layer {index} holds states, and is {mixer} here")
        if cache_layer is None or isinstance(other, cache_layer):
            continue
        if isinstance(other, CacheLayerMixin) and other.get_seq_length() > 0:
            raise ValueError(f"past_key_values: layer {index} holds keys and values, and is {mixer} here")
        cache.layers[index] = cache_layer(static=isinstance(cache, StaticCache))
        if getattr(other, "record_past", False):
            cache.layers[index].activate_past_recording()
    attention = (layer for layer, mixer in zip(cache.layers, mixers, strict=True) if MIXERS[mixer].cache_layer is None)
    counter = next(attention, cache.layers[0])
    for layer in cache.layers:
        own = None if layer is counter else counter
        if isinstance(layer, RecurrentCacheLayer) and layer.counter is not own:
            layer.counter = own
    return cache
