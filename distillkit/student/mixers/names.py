"""What tables and sentences call a mixer. Reports read it, so it is without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MixerName:
    """label: in tables. title: in sentences. tags: of a model card."""

    label: str
    title: str
    tags: tuple[str, ...] = ()


NAMES: dict[str, MixerName] = {
    "kda": MixerName("KDA", "Kimi Delta Attention", ("kimi-delta-attention", "linear-attention")),
    "full": MixerName("full attention", "full attention"),
}

_MIXER_OF = {"linear_attention": "kda", "full_attention": "full"}


def name_of(mixer: str) -> MixerName:
    """Of a mixer without a line above, and of other models' layer types, the name itself."""
    plain = mixer.replace("_", " ")
    return NAMES.get(mixer, MixerName(plain, plain))


def mixers_in(config: Mapping[str, Any]) -> list[str]:
    """The mixer of each layer, from the content of a student's config.json; empty for a model that is no student."""
    if config.get("model_type") != "kda_hybrid":
        return []
    if isinstance(mixers := config.get("mixers"), list):
        return mixers
    layer_types = config.get("layer_types")  # all that students of earlier versions say
    return [_MIXER_OF.get(str(kind), str(kind)) for kind in layer_types] if isinstance(layer_types, list) else []
