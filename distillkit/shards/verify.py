"""Checks the files of a captured dataset against its manifest."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from distillkit.runs.writing import sha256
from distillkit.shards.files import ShardRecord
from distillkit.shards.manifest import Manifest
from distillkit.shards.names import TOKENIZER, files_of


def verify_shards(folder: Path, manifest: Manifest) -> list[str]:
    """One line, which begins with the file's name, for each shard that is missing, truncated, altered or not part of
    this dataset, and for the background and the tokenizer likewise: for all that is read when one trains.

    Reads every byte of every shard, several shards at a time.
    """
    with ThreadPoolExecutor() as threads:
        found = threads.map(partial(_problems, folder), manifest.shards)
        problems = [line for lines in found for line in lines]
    known = {record.file for record in manifest.shards}
    for path in sorted(folder.glob("*.parquet")):
        if path.name not in known:
            problems.append(f"{path.name}: is not in the manifest; it belongs to another dataset")
    background = None if manifest.background is None else folder / manifest.background
    if background is not None and not background.is_file():
        problems.append(f"{background.name}: is missing")
    elif background is not None and manifest.background_sha256 not in (None, sha256(background)):
        problems.append(f"{background.name}: differs from what was captured (SHA-256)")
    problems += _tokenizer_problems(folder, manifest.tokenizer_files)
    expected = 0
    for record in manifest.shards:
        if record.plan != manifest.shards[0].plan:
            problems.append(f"{record.file}: belongs to another capture than {manifest.shards[0].file}")
        if record.rows[0] != expected:
            problems.append(f"{record.file}: starts at row {record.rows[0]}, but the shards before end at {expected}")
        expected = record.rows[1]
    return problems


def _tokenizer_problems(folder: Path, files: dict[str, str] | None) -> list[str]:
    """None where the files are not known, in the datasets of earlier versions."""
    if files is None:
        return []
    present = files_of(folder / TOKENIZER)
    problems = [f"{TOKENIZER}/{name}: is not in the manifest" for name in present if name not in files]
    for name, digest in files.items():
        if name not in present:
            problems.append(f"{TOKENIZER}/{name}: is missing")
        elif sha256(present[name]) != digest:
            problems.append(f"{TOKENIZER}/{name}: differs from what was captured (SHA-256)")
    return problems


def _problems(folder: Path, record: ShardRecord) -> list[str]:
    path = folder / record.file
    if not path.is_file():
        return [f"{record.file}: is missing"]
    size = path.stat().st_size
    if size < record.bytes:
        return [f"{record.file}: is truncated: {size:,} bytes, {record.bytes:,} were captured"]
    if size > record.bytes or sha256(path) != record.sha256:
        return [f"{record.file}: differs from what was captured (SHA-256)"]
    return []
