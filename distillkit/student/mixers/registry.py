"""The mixers by name, and those of a model's layers."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from distillkit.config import UserError
from distillkit.student.mixers.full import FullAttention
from distillkit.student.mixers.kda.mixer import KDA
from distillkit.student.mixers.mixer import Mixer
from distillkit.student.mixers.names import FULL

MIXERS: dict[str, Mixer] = {"kda": KDA(), FULL: FullAttention()}
"""By the names of `student.network.mixers.MIXERS`, which the YAML uses, too."""


def check_linear_mixer(name: str) -> None:
    """Raise `UserError` where `student.mixer` is not one that can stand in place of full attention."""
    linear = [each for each, mixer in MIXERS.items() if not mixer.keeps_teacher_weights]
    if name not in linear:
        raise UserError("student.mixer", f"must be one of {', '.join(linear)}, got {name!r}")


def mixers_of(config: PreTrainedConfig) -> list[Mixer]:
    """The mixer of each layer of a model: those that a student's configuration names, full attention in any other."""
    names = getattr(config, "mixers", None) or [FULL] * config.num_hidden_layers
    return [MIXERS[name] for name in names]


def mixed_layers(model: PreTrainedModel) -> list[tuple[Any, Mixer]]:
    """The attention of each layer of a model, and its mixer; empty where layers have no attention of that name."""
    layers = getattr(model.get_decoder(), "layers", [])
    modules = [getattr(layer, "self_attn", None) for layer in layers]
    return [(each, mixer) for each, mixer in zip(modules, mixers_of(model.config), strict=False) if each is not None]
