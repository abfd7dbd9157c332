"""Tensors of a codec to parquet columns and back: a list per row, in it a list per token, as in published datasets.

Whole buffers are moved; no value passes through Python.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Shaped
from torch import Tensor

from distillkit.config.errors import UserError

MOST_VALUES = 2**31 - 1
"""Of a column in one table: 32-bit integers count its lists, which every reader of parquet supports."""


def signal_table(columns: Mapping[str, Shaped[Tensor, "tokens _"]], lengths: Sequence[int]) -> pa.Table:
    """Columns of rows with `lengths` tokens each, from tensors that hold the tokens of all rows one after another."""
    return pa.table({name: signal_array(values, lengths) for name, values in columns.items()})


def signal_array(values: Shaped[Tensor, "tokens width"], lengths: Sequence[int]) -> pa.ListArray:
    """list<list<T>>: per row a list of tokens, per token a list of `width` values.

    Raises ValueError where the lengths do not add up to the tokens, or there are more values than a list can count.
    """
    tokens, width = values.shape
    if sum(lengths) != tokens:
        raise ValueError(f"lengths add up to {sum(lengths)}, but there are {tokens} tokens")
    if tokens * width > MOST_VALUES:
        raise ValueError(f"{tokens} tokens of {width} values are more than one table can hold")
    flat = pa.array(values.detach().cpu().contiguous().view(-1).numpy())
    per_token = pa.ListArray.from_arrays(np.arange(tokens + 1, dtype=np.int32) * np.int32(width), flat)
    return pa.ListArray.from_arrays(np.cumsum([0, *lengths], dtype=np.int32), per_token)


def signal_tensor(column: pa.ChunkedArray | pa.Array, name: str = "the column") -> Shaped[Tensor, "tokens width"]:
    """The tokens of all rows one after another; the inverse of `signal_array`, for any kind of list.

    The tensor may share the column's memory: do not write to it.

    name: of the column, for error messages.

    Raises `UserError` where the column does not hold lists of lists of numbers, where a value is missing, and where
    tokens have different numbers of values.
    """
    array = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) and column.num_chunks else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.array([], array.type)
    per_token = _flattened(array, name)
    values = _flattened(per_token, name)
    widths = pc.list_value_length(per_token)
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise UserError(name, f"must hold a list of numbers per token, but holds {column.type}")
    if values.null_count:
        raise UserError(name, "has missing values; capture it again")
    least, most = pc.min_max(widths).as_py().values() if len(widths) else (0, 0)
    if least != most:
        raise UserError(name, f"tokens have {least} to {most} values; all must have the same number")
    return torch.from_dlpack(values).view(len(per_token), most)


def _flattened(lists: pa.Array, name: str) -> pa.Array:
    kind = lists.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise UserError(name, f"must hold a list of numbers per token, but holds {kind}")
    if lists.null_count:
        raise UserError(name, "has missing values; capture it again")
    return lists.flatten()
