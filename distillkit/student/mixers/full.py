"""Full attention, with positions or without: the teacher's own layers."""

from typing import Any

from distillkit.student.mixers.mixer import Mixer, Start


class FullAttention(Mixer):
    """Its keys and values are kept for every token."""

    keeps_teacher_weights = True

    def initialize(self, layer: Any, attention: Any, start: Start) -> None:
        """Nothing is new."""

    def divide_rows(self, layer: Any) -> bool:
        """The attention implementation does it."""
        return True

    def state_bytes(self, layer: Any) -> int:
        return 0

    def cache_channels(self, layer: Any) -> int:
        channels: int = layer.k_proj.out_features + layer.v_proj.out_features
        return channels
