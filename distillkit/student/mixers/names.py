"""What tables and sentences call a mixer. Reports read it, so it is without torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

FULL = "full"
"""Full attention: the mixer of layers that keep the teacher's."""

Config = Mapping[str, Any]
"""The content of a model's config.json."""


@dataclass(frozen=True)
class MixerName:
    """label: in tables. title: in sentences. tags: of a model card. details: what follows the title in a model card."""

    label: str
    title: str
    tags: tuple[str, ...] = ()
    details: Callable[[Config], str] = lambda config: ""


def _kda_details(config: Config) -> str:
    heads = "its own keys and values for each query head" if config.get("kv_heads") == "expand" else "grouped heads"
    return f": {heads}, short convolutions of {config.get('conv_size')} tokens"


def _full_details(config: Config) -> str:
    return ", with the rotary embedding" if config.get("use_rope") else ", without positions (NoPE)"


NAMES: dict[str, MixerName] = {
    "kda": MixerName(
        "KDA", "Kimi Delta Attention", tags=("kimi-delta-attention", "linear-attention"), details=_kda_details
    ),
    FULL: MixerName("full attention", "full attention", details=_full_details),
}

_MIXER_OF = {"linear_attention": "kda", "full_attention": FULL}


def name_of(mixer: str) -> MixerName:
    """Of a mixer without a line above, and of other models' layer types, the name itself."""
    plain = mixer.replace("_", " ")
    return NAMES.get(mixer, MixerName(plain, plain))


def is_student(config: Config) -> bool:
    """Whether a model has the student network: a converted one, with mixers."""
    return config.get("model_type") == "kda_hybrid"


def mixers_in(config: Config) -> list[str]:
    """The mixer of each layer; empty for a model that is no converted student."""
    if not is_student(config):
        return []
    if isinstance(mixers := config.get("mixers"), list):
        return mixers
    layer_types = config.get("layer_types")  # all that students of earlier versions say
    return [_MIXER_OF.get(str(kind), str(kind)) for kind in layer_types] if isinstance(layer_types, list) else []
