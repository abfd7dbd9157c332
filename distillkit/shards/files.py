"""Shards: a parquet file, and a record of it in JSON.

The record is written after the file, so a shard that has a record is complete. One without is written again, with the
same bytes.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from distillkit.runs.writing import write_whole
from distillkit.shards.names import shard_name
from distillkit.shards.sealed import read_sealed, write_sealed

_ROWS_PER_GROUP = 64


@dataclass(frozen=True)
class ShardRecord:
    """One shard: rows `rows[0]` to `rows[1]` (exclusive) of the dataset."""

    file: str
    rows: tuple[int, int]
    tokens: int
    bytes: int
    sha256: str
    plan: str | None = None
    """SHA-256 of the capture's plan."""


def write_shard(
    folder: Path, index: int, table: pa.Table, rows: tuple[int, int], plan: str | None = None
) -> ShardRecord:
    """Write a shard and its record. Equal tables give equal bytes.

    table: one row per row of the dataset, with a column `input_ids`.
    rows: index of the first of these rows in the dataset, and of the last (exclusive).
    plan: SHA-256 of the capture's plan, kept in the record.

    Raises OSError where the disk is full; no partial file is left then.
    """
    path, whole = folder / f"{shard_name(index)}.parquet", pa.BufferOutputStream()
    # Parquet stores a byte as four bytes; encoded by its dictionary of 256 values it is one byte again.
    pq.write_table(table, whole, compression="zstd", write_statistics=False, row_group_size=_ROWS_PER_GROUP)
    content = memoryview(whole.getvalue())
    write_whole(path, content)
    tokens = sum(len(chunk.flatten()) for chunk in table["input_ids"].chunks)
    record = ShardRecord(path.name, rows, tokens, len(content), hashlib.sha256(content).hexdigest(), plan)
    write_sealed(folder / f"{shard_name(index)}.json", record)
    return record


def read_record(folder: Path, index: int) -> ShardRecord | None:
    """The record of a complete shard; None for one that has yet to be written, or whose record is damaged."""
    path, shard = folder / f"{shard_name(index)}.json", folder / f"{shard_name(index)}.parquet"
    try:
        record = read_sealed(path, ShardRecord)
        return record if (record.file, record.bytes) == (shard.name, shard.stat().st_size) else None
    except (OSError, ValueError):
        return None
