"""What a conversion changed, as a table: mixers, parameters, and what a sequence costs in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from rich.console import Group
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel

from distillkit.formatting import byte_text
from distillkit.student.mixers.names import FULL, name_of
from distillkit.student.mixers.registry import mixed_layers
from distillkit.student.network import KDAHybridForCausalLM

CONTEXT_LENGTHS = (4096, 32768, 131072)


@dataclass(frozen=True)
class LayerSummary:
    """One decoder layer: its mixer, and the parameters of that mixer in the teacher and the student."""

    mixer: str
    teacher_parameters: int
    student_parameters: int


@dataclass(frozen=True)
class MemorySummary:
    """Bytes that one sequence of `tokens` tokens keeps between two decoding steps."""

    tokens: int
    teacher_kv_cache: int
    student_kv_cache: int
    student_state: int


@dataclass(frozen=True)
class ConversionSummary:
    """Printed by rich as two tables. Parameters are counted once where weights are tied."""

    layers: Sequence[LayerSummary]
    teacher_parameters: int
    student_parameters: int
    memory: Sequence[MemorySummary]

    def __rich__(self) -> Group:
        return Group(self._layer_table(), self._memory_table())

    def _layer_table(self) -> Table:
        table = Table(title="Layers and parameters")
        table.add_column("layers")
        table.add_column("mixer")
        table.add_column("teacher, each", justify="right")
        table.add_column("student, each", justify="right")
        for layer, group in groupby(enumerate(self.layers), key=lambda item: item[1]):
            indices = [index for index, _ in group]
            span = str(indices[0]) if len(indices) == 1 else f"{indices[0]}-{indices[-1]}"
            table.add_row(span, layer.mixer, f"{layer.teacher_parameters:,}", f"{layer.student_parameters:,}")
        table.add_section()
        table.add_row("all", "whole model", f"{self.teacher_parameters:,}", f"{self.student_parameters:,}")
        return table

    def _memory_table(self) -> Table:
        table = Table(title="Memory per sequence while decoding")
        table.add_column("tokens", justify="right")
        table.add_column("teacher KV cache", justify="right")
        table.add_column("student KV cache", justify="right")
        table.add_column("student state", justify="right")
        for row in self.memory:
            sizes = (row.teacher_kv_cache, row.student_kv_cache, row.student_state)
            table.add_row(f"{row.tokens // 1024}k", *map(byte_text, sizes))
        return table


def summarize(teacher: PreTrainedModel, student: KDAHybridForCausalLM) -> ConversionSummary:
    """Count both models; they may lie on the meta device."""
    layers = [
        LayerSummary(_label(name, student), _count(old.self_attn), _count(new.self_attn))
        for name, old, new in zip(
            student.config.mixers, teacher.get_decoder().layers, student.model.layers, strict=True
        )
    ]
    memory = [
        MemorySummary(
            tokens,
            teacher_kv_cache=_kv_cache_bytes(teacher, tokens),
            student_kv_cache=_kv_cache_bytes(student, tokens),
            student_state=sum(mixer.state_bytes(layer) for layer, mixer in mixed_layers(student)),
        )
        for tokens in CONTEXT_LENGTHS
    ]
    return ConversionSummary(layers, _count(teacher), _count(student), memory)


def _kv_cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Keys and values of `tokens` tokens; no more than the window where a layer's slides."""
    total = 0
    for (layer, mixer), cache_layer in zip(mixed_layers(model), DynamicCache(config=model.config).layers, strict=True):
        cached_tokens = min(tokens, getattr(cache_layer, "sliding_window", tokens))
        total += cached_tokens * mixer.cache_channels(layer) * model.dtype.itemsize
    return total


def _label(mixer: str, student: KDAHybridForCausalLM) -> str:
    label = name_of(mixer).label
    return f"{label}, NoPE" if mixer == FULL and not student.config.use_rope else label


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
