"""A KDA layer whose rows are divided over processes: each mixes all tokens of some of its heads."""

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from distillkit.models.divided_rows import DividedRows, divided_rows
from distillkit.student.network import KimiDeltaAttention
from distillkit.student.network.documents import Documents


def divide_rows(layer: KimiDeltaAttention) -> None:
    """Exchange heads for tokens around the part of `layer` in which tokens meet, where rows are divided."""
    layer._mix_heads = partial(_mix_divided, layer, layer._mix_heads)  # type: ignore[method-assign]


@torch.compiler.disable
def _mix_divided(
    layer: KimiDeltaAttention,
    mix_heads: Any,
    projected: list[Tensor],
    weights: list[Tensor],
    gates: list[Tensor],
    vectors: list[Tensor],
    documents: Documents | None,
    cache: Any,
) -> Tensor:
    """See `KimiDeltaAttention._mix_heads`. `documents` are those of the parts that this process has, and not used."""
    rows = divided_rows()
    if rows is None:
        mixed: Tensor = mix_heads(projected, weights, gates, vectors, documents, cache)
        return mixed
    size, layout = layer.head_dim, projected[0].shape[:-1]
    of_heads = [each.unflatten(0, (-1, size)) for each in weights]
    parts = [each.reshape(rows.batch, -1, each.shape[-1] // size, size) for each in projected]
    if layer.num_kv_heads % rows.processes:
        repeats = layer.num_heads // layer.num_kv_heads
        parts[1:] = [each.repeat_interleave(repeats, dim=2) for each in parts[1:]]
        of_heads[1:] = [each.repeat_interleave(repeats, dim=0) for each in of_heads[1:]]
    parts += [
        each.reshape(rows.batch, -1, layer.num_heads, width) for each, width in zip(gates, (size, 1), strict=True)
    ]
    *whole, decay_gate, beta_gate = (each.flatten(0, 1).unsqueeze(0) for each in rows.to_heads(*parts))
    mixed = mix_heads(
        [each.flatten(2) for each in whole],
        [rows.own_heads(each).flatten(0, 1) for each in of_heads],
        [decay_gate, beta_gate.squeeze(-1)],
        [rows.own_heads(each.view(layer.num_heads, -1)).flatten() for each in vectors],
        _documents(rows),
        None,
    )
    mixed = rows.to_tokens(mixed.view(rows.batch, -1, *mixed.shape[2:]), layer.num_heads)
    return mixed.reshape(*layout, layer.num_heads, size)


@lru_cache(maxsize=1)  # every layer of a model asks for the same
def _documents(rows: DividedRows) -> Documents:
    return Documents.from_boundaries(rows.boundaries[0].tolist(), rows.position_ids.device)
