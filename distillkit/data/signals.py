"""Rows with a captured teacher's outputs: in each of a codec's columns, one list of numbers per token.

These are hundreds of bytes per token, so they are checked, repaired and read as buffers of Arrow; as Python numbers a
single batch would take seconds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset

from distillkit.config.errors import UserError
from distillkit.data.packing import relisted
from distillkit.data.rows import list_entries
from distillkit.shards import signal_tensor

_PER_TOKEN = ("input_ids", "labels", "attention_mask")


def aligned_rows(rows: Dataset, columns: Sequence[str], key: str) -> Dataset:
    """Rows with one entry per token in each of `columns`, without padding and without empty rows.

    The last token of a row may lack its entry, as in datasets published by others: it would predict a token that is not
    in the row. Rows that need no repair are not copied.

    Raises `UserError` for a missing column, and for a row whose columns differ in length.
    """
    missing = [name for name in ("input_ids", *columns) if name not in rows.column_names]
    if missing:
        raise UserError(
            key,
            f"has no column {' or '.join(missing)}, which a captured teacher needs; "
            f"its columns are {', '.join(rows.column_names)}",
        )
    present = [name for name in (*_PER_TOKEN, "seq_lengths") if name in rows.column_names]
    rows = rows.select_columns([*present, *columns])
    start, whole, widths = 0, True, dict.fromkeys(columns, 0)
    for table in rows.with_format("arrow").iter(batch_size=1000):
        whole = _is_whole(table, columns, start, key) and whole
        widths = {name: widths[name] or _width(table[name]) for name in columns}
        start += len(table)
    if not whole:
        repaired = rows.with_format("arrow").map(
            lambda table: _repaired(table, widths), batched=True, batch_size=16, desc="aligning rows"
        )
        rows = repaired.with_format(None)
    return rows.remove_columns("attention_mask") if "attention_mask" in present else rows


class TensorRows(TorchDataset[dict[str, Any]]):
    """Rows as `build_dataset` makes them, for a data loader: the numbers as tensors, `seq_lengths` as a list.

    For `__getitems__`, which a data loader calls, the row behind the last one has no tokens: `training.batches` fills
    batches with it. Whoever walks over the rows does not meet it.
    """

    def __init__(self, rows: Dataset, signal_columns: Sequence[str] = ()) -> None:
        self.rows = rows.with_format("arrow")
        self.signal_columns = tuple(signal_columns)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        if (empty := indices.count(len(self))) > 0:
            rows = self.__getitems__([index for index in indices if index < len(self)] or [0])
            return [*rows[: len(indices) - empty], *([{name: each[:0] for name, each in rows[0].items()}] * empty)]
        table = self.rows[indices]
        lengths = list_lengths(table["input_ids"]).tolist()
        tokens = {name: torch.tensor(_numbers(table[name])).split(lengths) for name in ("input_ids", "labels")}
        signals = {name: signal_tensor(table[name], name).split(lengths) for name in self.signal_columns}
        columns = {**tokens, **signals, "seq_lengths": table["seq_lengths"].to_pylist()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _is_whole(table: pa.Table, columns: Sequence[str], start: int, key: str) -> bool:
    """Whether no row needs repair. Raises `UserError` for a row that cannot be repaired."""
    lengths = list_lengths(table["input_ids"])
    whole = bool(lengths.all())
    for name in (name for name in table.column_names if name not in ("input_ids", "seq_lengths")):
        entries = list_lengths(table[name])
        wrong = np.flatnonzero((entries != lengths) & ((name not in columns) | (entries != lengths - 1)))
        if len(wrong):
            row = int(wrong[0])
            raise UserError(
                key,
                f"row {start + row} has {lengths[row]} input_ids and {entries[row]} entries in {name}; "
                "both must have the same number",
            )
        whole = whole and bool((entries == lengths).all())
    return whole and ("attention_mask" not in table.column_names or bool(_numbers(table["attention_mask"]).all()))


def _repaired(table: pa.Table, widths: Mapping[str, int]) -> pa.Table:
    """The tokens that `attention_mask` shows, each with an entry; missing entries are zeros."""
    lengths = list_lengths(table["input_ids"])
    row = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    seen = np.ones(len(row), dtype=bool)
    if "attention_mask" in table.column_names:
        seen = _numbers(table["attention_mask"]) != 0
    kept = np.bincount(row[seen], minlength=len(lengths))
    repaired = {}
    for name in table.column_names:
        if name == "seq_lengths":
            repaired[name] = pa.concat_arrays(table[name].chunks)
            continue
        entries = list_lengths(table[name])
        values = pa.concat_arrays(table[name].chunks).flatten()
        source = (np.cumsum(entries) - entries)[row] + position
        if name in widths:
            zero = pa.array([[0] * widths[name]], values.type)
            source = np.where(position < entries[row], source, len(values))
            values = pa.concat_arrays([values, zero])
        lists = pa.chunked_array([pa.ListArray.from_arrays([0, int(seen.sum())], values.take(pa.array(source[seen])))])
        repaired[name] = relisted(lists, kept)
    return pa.table(repaired).filter(pa.array(kept > 0))


def list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Lengths of all lists of a column, 0 for a missing one; their entries are not read."""
    return pc.list_value_length(column).fill_null(0).to_numpy()


def _width(column: pa.ChunkedArray) -> int:
    """Numbers per token; 0 where the column has no token."""
    return next((len(chunk.flatten()[0]) for chunk in column.chunks if len(chunk.flatten())), 0)


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return list_entries(column)[1].to_numpy()
