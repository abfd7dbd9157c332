"""`distillkit pack`: captured rows to rows of a fixed length, each token beside what the teacher said there.

First only the lengths are looked at and it is decided which document, or piece of one, goes where; then shards are
written from slices of the memory-mapped source, one at a time. So memory holds one shard, whatever the size of the
dataset, and a killed run goes on with the first shard that is missing, for the same lengths give the same rows.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from rich.console import Console
from rich.progress import track

from distillkit.capture.progress import say
from distillkit.config import DatasetSource, UserError
from distillkit.data.prepared import file_states
from distillkit.data.sources import load_source
from distillkit.shards import (
    Manifest,
    ShardRecord,
    read_manifest,
    read_record,
    remove_leftovers,
    verify_shards,
    write_manifest,
    write_shard,
    write_whole,
)
from distillkit.teacher.tokenizer import copy_tokenizer

TOKENS_PER_SHARD = 2**19
TOKENS_PACKED_TOGETHER = 2**24
"""Rows are filled from documents that lie so close together in the source; it keeps their order but for that."""

_NOTE = ".packed_from.json"
_KEY = "DATASET"


@dataclass(frozen=True)
class Pieces:
    """Documents, or pieces of them: `length` tokens of a row of the source, from its token `start`."""

    row: np.ndarray
    start: np.ndarray
    length: np.ndarray


def pack(source: DatasetSource, out: Path, sequence_length: int, console: Console | None = None) -> None:
    """Fill rows of `sequence_length` tokens with documents, best fit first; longer documents are split.

    Of a captured dataset, or a published one, comes another such in the folder `out`, which is there whole or not at
    all. Columns with one entry per token move with their tokens; others are left out. What a manifest says of the
    source is carried over.

    Raises `UserError` where the source cannot be read or is damaged, or `out` holds something else.
    """
    console = console or Console()
    manifest = _checked_manifest(source)
    made_from = _made_from(source, manifest, sequence_length)
    if _finished(out, made_from):
        say(console, f"{out}: is packed already, nothing is left to do")
        return
    rows = load_source(source, _KEY)
    columns = _columns_per_token(rows, manifest)
    pieces = _split(rows, columns, sequence_length)
    if len(pieces.length) == 0:
        raise UserError(f"{_KEY}: has only empty rows")
    packed = list(_pack(pieces.length, sequence_length))
    say(console, f"packing {int(pieces.length.sum()):,} tokens into {len(packed):,} rows of {sequence_length:,}")
    partial = out.with_name(f".{out.name}.partial")
    _open(partial, made_from)
    records = _write_shards(partial, rows.select_columns(columns), pieces, packed, sequence_length, console)
    if manifest is None:
        for index in range(len(records)):
            (partial / records[index].file).with_suffix(".json").unlink()
    else:
        if manifest.background is not None:
            write_whole(partial / manifest.background, (_folder(source) / manifest.background).read_bytes())
        copy_tokenizer(_folder(source), partial)
        write_manifest(partial, replace(manifest, shards=tuple(records), packed_to=sequence_length))
    partial.rename(out)
    filled = pieces.length.sum() / (len(packed) * sequence_length)
    say(console, f"{out}: {len(rows):,} rows became {len(packed):,}, {filled:.1%} filled, in {len(records)} shards")


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in groups that add up to no more than `capacity`, in as few groups as best fit finds.

    Best-fit decreasing: longest first, each into the group with the least room that is enough. Groups and what is in
    them come in the order of the lengths. No length may be above `capacity`.
    """
    groups: list[list[int]] = []
    open_groups: dict[int, list[int]] = {}  # by the room that is left
    rooms: list[int] = []  # the keys, sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        position = bisect_left(rooms, lengths[index])
        if position == len(rooms):
            room, group = capacity, len(groups)
            groups.append([])
        else:
            room = rooms[position]
            group = open_groups[room].pop()
            if not open_groups[room]:
                del open_groups[room], rooms[position]
        groups[group].append(index)
        left = room - lengths[index]
        if left not in open_groups:
            insort(rooms, left)
            open_groups[left] = []
        open_groups[left].append(group)
    return sorted(sorted(group) for group in groups)


def _checked_manifest(source: DatasetSource) -> Manifest | None:
    folder = _folder(source)
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None and (folder / "plan.json").is_file():
        raise UserError(f"{_KEY}: {folder} is a capture that has not ended; start it again with the same configuration")
    problems = [] if manifest is None else verify_shards(folder, manifest)
    if problems:
        more = f" (and {len(problems) - 1} more; distillkit inspect --verify names them)" if len(problems) > 1 else ""
        raise UserError(f"{folder}: {problems[0]}{more}")
    return manifest


def _folder(source: DatasetSource) -> Path:
    return Path(source.disk_path or source.repo_id or "")


def _made_from(source: DatasetSource, manifest: Manifest | None, sequence_length: int) -> dict[str, Any]:
    """What the rows that come out depend on, as JSON gives it back."""
    files: list[Any] = [] if source.disk_path is None else file_states(source.disk_path)
    if manifest is not None:
        files = [(record.file, record.sha256) for record in manifest.shards]
    listed = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    chosen = source.model_dump(exclude={"disk_path"} if source.disk_path is not None else None)
    return {"version": 1, "source": chosen, "files": listed, "sequence_length": sequence_length}


def _finished(out: Path, made_from: dict[str, Any]) -> bool:
    if not out.exists():
        return False
    note = out / _NOTE
    if not note.is_file() or json.loads(note.read_text()) != made_from:
        raise UserError(f"OUT: {out} exists already and is something else; name a new folder")
    return True


def _open(partial: Path, made_from: dict[str, Any]) -> None:
    """The folder to write into: as a killed run left it, or empty where that one packed something else."""
    note = partial / _NOTE
    if partial.exists() and not (note.is_file() and json.loads(note.read_text()) == made_from):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    remove_leftovers(partial)
    write_whole(note, json.dumps(made_from, indent=2).encode())


def _columns_per_token(rows: Dataset, manifest: Manifest | None) -> list[str]:
    """What is carried: all columns of a captured dataset; of others, those with an entry per token in row 0."""
    if "input_ids" not in rows.column_names:
        raise UserError(f"{_KEY}: has no column input_ids; it holds {', '.join(rows.column_names)}")
    if manifest is not None:
        return [name for name in rows.column_names if name != "seq_lengths"]
    first = rows.with_format("arrow")[:1]
    lists = [field.name for field in first.schema if pa.types.is_list(field.type) or pa.types.is_large_list(field.type)]
    tokens = pc.list_value_length(first["input_ids"])[0]
    return [
        name
        for name in lists
        if name not in ("seq_lengths", "attention_mask") and pc.list_value_length(first[name])[0] == tokens
    ]


def _split(rows: Dataset, columns: Sequence[str], sequence_length: int) -> Pieces:
    """Documents of all rows, in order; those longer than `sequence_length` in pieces."""
    row, start, length = (np.concatenate(parts) for parts in zip(*_documents(rows, columns), strict=True))
    pieces = -(-length // sequence_length)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    before = (np.arange(pieces.sum()) - first) * sequence_length
    rest = np.repeat(length, pieces) - before
    return Pieces(np.repeat(row, pieces), np.repeat(start, pieces) + before, np.minimum(rest, sequence_length))


def _documents(rows: Dataset, columns: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Row, first token in it and length of each document; columns are held to one entry per token."""
    known = [name for name in ("seq_lengths", "attention_mask") if name in rows.column_names]
    first_row = 0
    for batch in rows.select_columns([*columns, *known]).with_format("arrow").iter(batch_size=1000):
        tokens = _lengths(batch["input_ids"])
        for name in columns:
            _require_one_per_token(_lengths(batch[name]), tokens, name, first_row)
        if "attention_mask" in known and not pc.all(pc.cast(_flat(batch["attention_mask"]), pa.bool_())).as_py():
            raise UserError(f"{_KEY}: holds padding (attention_mask 0); remove it from the rows first")
        parts = tokens if "seq_lengths" not in known else _flat(batch["seq_lengths"]).to_numpy().astype(np.int64)
        counts = np.ones_like(tokens) if "seq_lengths" not in known else _lengths(batch["seq_lengths"])
        row = np.repeat(np.arange(len(tokens)), counts)
        totals = np.bincount(row, weights=parts, minlength=len(tokens)).astype(np.int64)
        _require_one_per_token(totals, tokens, "seq_lengths", first_row)
        start = np.cumsum(parts) - parts - np.repeat(np.cumsum(tokens) - tokens, counts)
        kept = parts > 0
        yield first_row + row[kept], start[kept], parts[kept]
        first_row += len(tokens)


def _require_one_per_token(found: np.ndarray, tokens: np.ndarray, name: str, first_row: int) -> None:
    wrong = np.flatnonzero(found != tokens)
    if len(wrong):
        row = int(wrong[0])
        raise UserError(
            f"{_KEY}: row {first_row + row} has {tokens[row]} input_ids, but {name} speaks of {found[row]} tokens"
        )


def _pack(lengths: np.ndarray, sequence_length: int) -> Iterator[np.ndarray]:
    """Indices of the pieces in each packed row."""
    ends = np.cumsum(lengths)
    start = 0
    while start < len(lengths):
        together = ends[start] - lengths[start] + max(TOKENS_PACKED_TOGETHER, 64 * sequence_length)
        stop = int(np.searchsorted(ends, together, side="right"))
        stop = max(stop, start + 1)
        for group in best_fit(lengths[start:stop].tolist(), sequence_length):
            yield start + np.array(group)
        start = stop


def _write_shards(
    folder: Path,
    rows: Dataset,
    pieces: Pieces,
    packed: Sequence[np.ndarray],
    sequence_length: int,
    console: Console,
) -> list[ShardRecord]:
    """All shards that are not there yet; the records of all."""
    rows_per_shard = max(1, TOKENS_PER_SHARD // sequence_length)
    starts = range(0, len(packed), rows_per_shard)
    records = []
    for index, start in enumerate(track(starts, "packing", console=console, disable=not console.is_terminal)):
        record = read_record(folder, index)
        if record is None:
            chosen = packed[start : start + rows_per_shard]
            record = write_shard(folder, index, _shard(rows, pieces, chosen), (start, start + len(chosen)))
        records.append(record)
    return records


def _shard(rows: Dataset, pieces: Pieces, packed: Sequence[np.ndarray]) -> pa.Table:
    """Packed rows with their tokens, in the order of the pieces in each."""
    chosen = np.concatenate(packed)
    needed, position = np.unique(pieces.row[chosen], return_inverse=True)
    table = rows.with_format("arrow")[needed.tolist()]
    tokens = _lengths(table["input_ids"])
    first_token = (np.cumsum(tokens) - tokens)[position] + pieces.start[chosen]
    lengths = pieces.length[chosen]
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    taken = pa.array(np.repeat(first_token, lengths) + within)
    counts = [len(row) for row in packed]
    ends = np.cumsum([0, *(lengths_of_row.sum() for lengths_of_row in np.split(lengths, np.cumsum(counts)[:-1]))])
    columns = {name: _lists(_flat(table[name]).take(taken), ends) for name in table.column_names}
    return pa.table({**columns, "seq_lengths": _lists(pa.array(lengths, pa.int32()), np.cumsum([0, *counts]))})


def _lists(values: pa.Array, ends: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), values)


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks).flatten()


def _lengths(column: pa.ChunkedArray) -> np.ndarray:
    return pc.list_value_length(column).to_numpy().astype(np.int64)
