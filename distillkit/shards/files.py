"""Files that are whole or not there: write under another name, fsync, rename.

A shard is a parquet file and a record of it beside it. The record is written after the file, so a shard that has a
record is complete; one without is written again, with the same bytes. Names of unfinished files say which process of
which machine writes them, so that any number of processes may write into one folder, even the same shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_UNFINISHED = ".unfinished"
_ROWS_PER_GROUP = 64


@dataclass(frozen=True)
class ShardRecord:
    """One shard: rows `rows[0]` to `rows[1]` (exclusive) of the dataset."""

    file: str
    rows: tuple[int, int]
    tokens: int
    bytes: int
    sha256: str

    @staticmethod
    def from_json(content: Any) -> ShardRecord:
        """Raises KeyError, TypeError or ValueError where it is no record."""
        start, stop = content["rows"]
        return ShardRecord(content["file"], (start, stop), content["tokens"], content["bytes"], content["sha256"])


def shard_name(index: int) -> str:
    """`shard-00007`, to which .parquet and .json are added."""
    return f"shard-{index:05d}"


def write_shard(folder: Path, index: int, table: pa.Table, rows: tuple[int, int]) -> ShardRecord:
    """Write a shard and its record. Equal tables give equal bytes.

    table: one row per row of the dataset, with a column `input_ids`.
    rows: first and last (exclusive) of the dataset's rows that these are.

    Raises OSError where there is no room; nothing remains of the attempt then.
    """
    path = folder / f"{shard_name(index)}.parquet"
    staged = _staged(path)
    try:
        with staged.open("wb") as file:
            pq.write_table(
                table, file, compression="zstd", use_dictionary=False, write_statistics=False, version="2.6",
                row_group_size=_ROWS_PER_GROUP,
            )  # fmt: skip
            file.flush()
            os.fsync(file.fileno())
        tokens = sum(len(chunk.flatten()) for chunk in table["input_ids"].chunks)
        record = ShardRecord(path.name, rows, tokens, staged.stat().st_size, sha256(staged))
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    _fsync_folder(folder)
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


def completed(folder: Path, shards: int) -> dict[int, ShardRecord]:
    """The records of those of the first `shards` shards that are complete."""
    records = {index: read_record(folder, index) for index in range(shards)}
    return {index: record for index, record in records.items() if record is not None}


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part, even after a power cut."""
    staged = _staged(path)
    try:
        with staged.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    _fsync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Delete unfinished files of processes of this machine that are no more."""
    for path in folder.glob(f".*.{_machine()}.*{_UNFINISHED}"):
        if not _alive(int(path.name.split(".")[-2])):
            path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _staged(path: Path) -> Path:
    return path.with_name(f".{path.name}.{_machine()}.{os.getpid()}{_UNFINISHED}")


def _machine() -> str:
    return socket.gethostname().split(".")[0]


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _fsync_folder(folder: Path) -> None:
    """So that a rename is on disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
