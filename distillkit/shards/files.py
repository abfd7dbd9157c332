"""Shards: a parquet file and a record of it beside it.

The record is written after the file, so a shard that has a record is complete; one without is written again, with the
same bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distillkit.runs.writing import write_whole

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
    """Digest of the plan of the capture that it is a part of."""

    @staticmethod
    def from_json(content: Any) -> ShardRecord:
        """Raises KeyError, TypeError or ValueError where it is no record."""
        start, stop = content["rows"]
        return ShardRecord(**{**content, "rows": (start, stop)})


def shard_name(index: int) -> str:
    """`shard-00007`, to which .parquet and .json are added."""
    return f"shard-{index:05d}"


def write_shard(
    folder: Path, index: int, table: pa.Table, rows: tuple[int, int], plan: str | None = None
) -> ShardRecord:
    """Write a shard and its record. Equal tables give equal bytes.

    table: one row per row of the dataset, with a column `input_ids`.
    rows: first and last (exclusive) of the dataset's rows that these are.
    plan: digest of what the shard is a part of, kept in its record.

    Raises OSError where there is no room; nothing remains of the attempt then.
    """
    path, whole = folder / f"{shard_name(index)}.parquet", pa.BufferOutputStream()
    # Parquet stores a byte as four; by way of its dictionary of 256 it is a byte again.
    pq.write_table(table, whole, compression="zstd", write_statistics=False, row_group_size=_ROWS_PER_GROUP)
    content = memoryview(whole.getvalue())
    write_whole(path, content)
    tokens = sum(len(chunk.flatten()) for chunk in table["input_ids"].chunks)
    record = ShardRecord(path.name, rows, tokens, len(content), hashlib.sha256(content).hexdigest(), plan)
    text = json.dumps(asdict(record), indent=2, sort_keys=True) + "\n"
    write_whole(folder / f"{shard_name(index)}.json", text.encode())
    return record


def read_record(folder: Path, index: int) -> ShardRecord | None:
    """The record of a shard that is complete; None for one that is still to be written."""
    path, shard = folder / f"{shard_name(index)}.json", folder / f"{shard_name(index)}.parquet"
    try:
        record = ShardRecord.from_json(json.loads(path.read_bytes()))
        return record if shard.stat().st_size == record.bytes else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
