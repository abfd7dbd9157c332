"""`distillkit pack`: captured rows to rows of a fixed length, each token with the teacher's outputs for it.

First only the lengths are read: they decide where documents are split, and which consecutive pieces make a shard. Then
each shard is read from the memory-mapped source, packed by itself, and written. So memory holds one shard, the source
is read once, and a killed run continues with the first missing shard, because the same lengths give the same shards.
One or two rows per shard are not full.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset
from pydantic import TypeAdapter
from rich.console import Console
from rich.progress import track
from trl.data_utils import pack_dataset

from distillkit.compression import SIGNAL_COLUMNS
from distillkit.config import DatasetSource, UserError
from distillkit.console import print_line
from distillkit.data.packing import document_lengths, piece_lengths
from distillkit.data.prepared import file_states
from distillkit.data.rows import running_sums
from distillkit.data.signals import aligned_rows, list_lengths
from distillkit.data.sources import load_source
from distillkit.runs.writing import read_json, remove_leftovers, sha256, write_whole
from distillkit.shards import (
    Manifest,
    ShardRecord,
    read_manifest,
    read_record,
    verify_shards,
    write_manifest,
    write_shard,
)
from distillkit.shards.names import BACKGROUND, CARD, PLAN, inside
from distillkit.teacher.captured_tokenizer import copy_tokenizer

TOKENS_PER_SHARD = 2**19
ROWS_PER_SHARD = 64
"""At least, so that unfilled rows do not matter; fewer where these are more than `BYTES_PER_SHARD`, uncompressed."""
BYTES_PER_SHARD = 2**29

_RECORD = ".packed_from.json"
_KEY = "DATASET"


def pack(source: DatasetSource, out: Path, sequence_length: int, console: Console | None = None) -> None:
    """Fill rows of `sequence_length` tokens with documents, best fit first; longer documents are split.

    A captured or published dataset becomes another one in the folder `out`, which is complete or absent. Labels and
    columns with a list of numbers per token move with their tokens; other columns are left out. The manifest is carried
    over. Where `out` is there already, only missing or damaged shards are made again.

    Raises `UserError` where the source cannot be read or is damaged, or `out` holds something else.
    """
    console = console or Console()
    manifest = _checked_manifest(source)
    made_from = _made_from(source, manifest, sequence_length)
    partial = out.with_name(f".{out.name}.partial")
    if out.exists():
        damaged = _damaged(out, made_from)
        if not damaged:
            print_line(console, f"{out}: is packed already")
            return
        print_line(console, f"{out}: {', '.join(damaged)}: missing or damaged, made again")
        _take_apart(out, partial, damaged)
    rows = _packable(load_source(source, _KEY), console)
    documents, rows_start = _documents(rows)
    pieces = piece_lengths(documents, sequence_length)
    if len(pieces) == 0:
        raise UserError(_KEY, "has only empty rows")
    shards = _shards(pieces, _tokens_per_shard(rows, sequence_length))
    print_line(console, f"packing {pieces.sum():,} tokens into rows of {sequence_length:,}, in {len(shards):,} shards")
    _open(partial, made_from)
    records = []
    first_row = first_token = 0
    for index, shard in enumerate(track(shards, "packing", console=console, disable=not console.is_terminal)):
        record = read_record(partial, index)
        if record is None:
            table = _packed(rows, rows_start, shard, first_token, sequence_length)
            record = write_shard(partial, index, table, (first_row, first_row + len(table)))
        records.append(record)
        first_row, first_token = record.rows[1], first_token + int(shard.sum())
    _finish(source, manifest, partial, records, made_from)
    partial.rename(out)
    count = records[-1].rows[1]
    filled = pieces.sum() / (count * sequence_length)
    print_line(console, f"{out}: {len(rows):,} rows became {count:,}, {filled:.1%} filled, in {len(records)} shards")


def _checked_manifest(source: DatasetSource) -> Manifest | None:
    folder = _folder(source)
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None and (folder / PLAN).is_file():
        raise UserError(
            _KEY, f"{folder} holds a capture that is not complete; start it again with the same configuration"
        )
    problems = [] if manifest is None else verify_shards(folder, manifest)
    if problems:
        more = f" (and {len(problems) - 1} more; distillkit inspect --verify names them)" if len(problems) > 1 else ""
        raise UserError(folder, f"{problems[0]}{more}")
    return manifest


def _folder(source: DatasetSource) -> Path:
    return Path(source.disk_path or source.repo_id or "")


def _made_from(source: DatasetSource, manifest: Manifest | None, sequence_length: int) -> dict[str, Any]:
    """Everything that the packed rows depend on, as it is after a round trip through JSON."""
    files: list[Any] = [] if source.disk_path is None else file_states(source.disk_path)
    if manifest is not None:
        files = [(record.file, record.sha256) for record in manifest.shards]
    listed = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    chosen = source.model_dump(exclude={"disk_path"} if source.disk_path is not None else None)
    return {"version": 2, "source": chosen, "files": listed, "sequence_length": sequence_length}


def _damaged(out: Path, made_from: dict[str, Any]) -> list[str]:
    """Files of a complete folder that are missing or have changed."""
    record, written = _read_made_from(out)
    if record != made_from:
        raise UserError("OUT", f"{out} exists already and holds something else; name a new folder")
    for name in written:
        inside(out, name, _RECORD)  # what it names may be deleted
    return [name for name, digest in written.items() if not (out / name).is_file() or sha256(out / name) != digest]


def _take_apart(out: Path, partial: Path, damaged: Sequence[str]) -> None:
    """Turn a complete folder into one that a killed run would have left."""
    _clear(partial)
    for name in damaged:
        (out / name).unlink(missing_ok=True)
    out.rename(partial)


def _clear(partial: Path) -> None:
    """Delete what a killed run left. Raises `UserError` for a folder that no run made."""
    if not partial.exists():
        return
    remove_leftovers(partial)
    if not partial.is_symlink() and ((partial / _RECORD).is_file() or not any(partial.iterdir())):
        shutil.rmtree(partial)
        return
    raise UserError("OUT", f"{partial}, where it would be packed first, holds something else; move it away")


def _read_made_from(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What a folder was packed from, and the SHA-256 of its files once complete; both empty for any other folder."""
    try:
        record = read_json(folder / _RECORD)
        written = TypeAdapter(dict[str, str]).validate_python(record.pop("written", {}))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}, {}
    return record, written


def _open(partial: Path, made_from: dict[str, Any]) -> None:
    """The folder to write into: as a killed run left it, or empty where that run packed something else."""
    if _read_made_from(partial)[0] != made_from:
        _clear(partial)
    partial.mkdir(parents=True, exist_ok=True)
    remove_leftovers(partial)
    write_whole(partial / _RECORD, json.dumps(made_from, indent=2).encode())


def _finish(
    source: DatasetSource,
    manifest: Manifest | None,
    partial: Path,
    records: Sequence[ShardRecord],
    made_from: dict[str, Any],
) -> None:
    """Write everything but the shards. A published dataset has no manifest, and only parquet files."""
    if manifest is None:
        for record in records:
            (partial / record.file).with_suffix(".json").unlink()
    else:
        if manifest.background is not None:
            write_whole(partial / BACKGROUND, (_folder(source) / manifest.background).read_bytes())
            manifest = replace(manifest, background=BACKGROUND)
        copy_tokenizer(_folder(source), partial)
        packed_to = made_from["sequence_length"]
        write_manifest(partial, replace(manifest, shards=tuple(records), packed_to=packed_to))
    written = {record.file: record.sha256 for record in records}
    for path in sorted(path for path in partial.rglob("*") if path.is_file()):
        name = path.relative_to(partial).as_posix()
        if name not in (_RECORD, CARD, *written):  # a user may edit the card
            written[name] = sha256(path)
    write_whole(partial / _RECORD, json.dumps({**made_from, "written": written}, indent=2).encode())


def _packable(rows: Dataset, console: Console) -> Dataset:
    """Columns that can be packed: tokens, labels, document boundaries, and those with an entry per token."""
    if "input_ids" not in rows.column_names:
        raise UserError(_KEY, f"has no column input_ids; it holds {', '.join(rows.column_names)}")
    signals = [field.name for field in rows.features.arrow_schema if _holds_numbers_per_token(field.type)]
    fitting = _fitting(rows, [name for name in signals if name not in SIGNAL_COLUMNS])
    packable = aligned_rows(rows, [name for name in signals if name in SIGNAL_COLUMNS or name in fitting], _KEY)
    left_out = [name for name in rows.column_names if name not in ("attention_mask", *packable.column_names)]
    if left_out:
        names = ", ".join(left_out)
        print_line(console, f"columns left out, because they do not hold a list of numbers per token: {names}")
    return packable


def _holds_numbers_per_token(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    entry = kind.value_type
    of_lists = pa.types.is_list(entry) or pa.types.is_large_list(entry) or pa.types.is_fixed_size_list(entry)
    return of_lists and (pa.types.is_integer(entry.value_type) or pa.types.is_floating(entry.value_type))


def _fitting(rows: Dataset, names: Sequence[str]) -> set[str]:
    """Columns that have an entry for each token of every row, or for all but the last."""
    fitting = set(names)
    for table in rows.select_columns(["input_ids", *names]).with_format("arrow").iter(batch_size=1000):
        tokens = list_lengths(table["input_ids"])
        fitting -= {name for name in fitting if not np.isin(tokens - list_lengths(table[name]), (0, 1)).all()}
    return fitting


def _documents(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of the documents of all rows, and the number of tokens before each row and before the end."""
    names = [name for name in ("input_ids", "seq_lengths") if name in rows.column_names]
    documents, tokens = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    row = 0
    for table in rows.select_columns(names).with_format("arrow").iter(batch_size=1000):
        lengths = list_lengths(table["input_ids"])
        parts, sums = document_lengths(table["seq_lengths"]) if "seq_lengths" in names else (lengths, lengths)
        wrong = np.flatnonzero(sums != lengths)
        if len(wrong):
            total, found = sums[wrong[0]], lengths[wrong[0]]
            raise UserError(_KEY, f"row {row + wrong[0]} has {found} tokens, but its seq_lengths add up to {total}")
        documents.append(parts[parts > 0])
        tokens.append(lengths)
        row += len(lengths)
    return np.concatenate(documents), running_sums(np.concatenate(tokens))


def _tokens_per_shard(rows: Dataset, sequence_length: int) -> int:
    first = rows.with_format("arrow")[:1]
    most = BYTES_PER_SHARD * len(first["input_ids"][0]) // first.nbytes
    return max(sequence_length, min(max(TOKENS_PER_SHARD, ROWS_PER_SHARD * sequence_length), most))


def _shards(pieces: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Consecutive pieces that end within the same `tokens` tokens; no piece is longer than that."""
    of_shard = (np.cumsum(pieces) - 1) // tokens
    return np.split(pieces, np.searchsorted(of_shard, np.arange(1, of_shard[-1] + 1)))


def _packed(rows: Dataset, rows_start: np.ndarray, pieces: np.ndarray, start: int, sequence_length: int) -> pa.Table:
    """Consecutive pieces of the source, the first from its token `start` on, in rows."""
    stop = start + int(pieces.sum())
    first, last = np.searchsorted(rows_start, [start, stop - 1], side="right") - 1
    table = rows.with_format("arrow")[int(first) : int(last) + 1]
    bounds, skipped = pa.array(running_sums(pieces), pa.int32()), start - int(rows_start[first])
    columns = {}
    for name in table.column_names:
        if name != "seq_lengths":
            entries = pa.chunked_array([chunk.flatten() for chunk in table[name].chunks])
            columns[name] = pa.ListArray.from_arrays(
                bounds, pa.concat_arrays(entries.slice(skipped, stop - start).chunks)
            )
    documents = Dataset(pa.table(columns), fingerprint=f"pieces-{start}")  # otherwise all numbers are hashed
    with _without_progress_bars():
        return pack_dataset(documents, sequence_length, "bfd_split", {"batch_size": None}).with_format("arrow")[:]


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """The datasets library has one for each shard."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
