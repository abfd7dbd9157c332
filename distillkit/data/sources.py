"""Rows as they are stored: a dataset of the hub, a folder of `save_to_disk`, or files. Columns are checked later.

Splits and parts of splits (`train[:1000]`) work for all of them. Nothing is written beside the user's files; the
datasets library converts files in its own cache.
"""

import glob
import os
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, ReadInstruction
from datasets.exceptions import DatasetsError

from distillkit.config.data import DatasetSource
from distillkit.config.errors import UserError
from distillkit.shards import read_manifest
from distillkit.shards.names import PLAN, SHARD

_JSON_AT_ONCE = 10 * 2**20
"""Bytes of a JSON file that the datasets library reads at once."""
LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}


def load_source(source: DatasetSource, key: str = "dataset") -> Dataset:
    """All rows of the source, in its order, with all columns.

    key: the key of the YAML that holds the source, for error messages.

    Raises `UserError` for a source without rows, and for an unknown split.
    """
    named = source.disk_path or source.repo_id or ""
    local = source.disk_path is not None or os.path.exists(named)
    where = f"{key}.{'disk_path' if source.disk_path is not None else 'repo_id'}: cannot read {named!r}"
    try:
        splits = _local_splits(named, where) if local else _hub_splits(source)
    except (StopIteration, IndexError) as error:  # what the datasets library raises for files without rows
        raise UserError(where, "it has no rows") from error
    except (OSError, ValueError, DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UserError(where, reason) from error
    rows = _choose_split(splits, source.split, named, f"{key}.split")
    if len(rows) == 0:
        raise UserError(where, "it has no rows")
    return rows


def local_files(path: str) -> list[str]:
    """The data files of `disk_path`, sorted: the file itself, those in the folder, or those that match the pattern."""
    if os.path.isdir(path):
        found = glob.iglob(os.path.join(glob.escape(path), "**"), recursive=True)
        return sorted(name for name in found if os.path.isfile(name))
    return [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.iglob(path, recursive=True)))


def _hub_splits(source: DatasetSource) -> DatasetDict:
    assert source.repo_id is not None
    loaded = datasets.load_dataset(source.repo_id, source.config_name, revision=source.revision)
    assert isinstance(loaded, DatasetDict)
    return loaded


def _local_splits(path: str, where: str) -> DatasetDict:
    if os.path.isfile(os.path.join(path, "dataset_dict.json")) or os.path.isfile(os.path.join(path, "state.json")):
        saved = datasets.load_from_disk(path)
        return saved if isinstance(saved, DatasetDict) else DatasetDict({str(saved.split or "train"): saved})
    if os.path.isdir(path) and (manifest := read_manifest(Path(path))) is not None:  # a captured dataset
        shards = [os.path.join(path, shard.file) for shard in manifest.shards]
        return datasets.load_dataset("parquet", data_files={"train": shards})
    if os.path.isfile(os.path.join(path, PLAN)) and glob.glob(os.path.join(glob.escape(path), f"{SHARD}*")):
        raise UserError(where, "its capture is not finished; run the same distillkit capture again to complete it")
    files = local_files(path)
    if not files:
        raise UserError(where, "there is no such file or folder, or it is empty")
    data_files = [name for name in files if os.path.splitext(name)[1] in LOADERS]
    kinds = sorted({LOADERS[os.path.splitext(name)[1]] for name in data_files})
    if not kinds or (not os.path.isdir(path) and len(data_files) < len(files)):
        raise UserError(where, f"files must be {', '.join(LOADERS)}, or a folder of save_to_disk")
    if len(kinds) > 1:
        raise UserError(where, f"it holds {' and '.join(kinds)} files; name one kind by a pattern such as {path}/*.txt")
    for name in data_files if kinds == ["json"] else ():
        _refuse_null(name)
    options = {"sample_by": "document"} if kinds == ["text"] else {}  # a file is a document, not each of its lines
    if os.path.isdir(path):  # splits by file names, as in a dataset of the hub
        return datasets.load_dataset(path, **options)
    return datasets.load_dataset(kinds[0], data_files={"train": data_files}, **options)


def _refuse_null(file: str) -> None:
    """Raises ValueError where a stretch of a JSON file begins with the row null: there pyarrow ends the process."""
    with open(file, "rb") as rows:
        start, end = 0, os.path.getsize(file)
        while start < end:
            first = next((part for part in iter(lambda: rows.readline(4096), b"") if not part.isspace()), b"")
            if first.split()[:1] == [b"null"]:
                raise ValueError("a row is null; each must be a mapping of columns to values")
            rows.seek(start + _JSON_AT_ONCE)
            rows.readline()
            start = rows.tell()


def _choose_split(splits: DatasetDict, split: str | None, named: str, key: str) -> Dataset:
    names = ", ".join(splits)
    if split is None:
        if len(splits) > 1:
            raise UserError(key, f"is missing: {named!r} has the splits {names}; name one")
        return next(iter(splits.values()))
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    except ValueError as error:
        raise UserError(key, f"{named!r} has no split {split!r}; it has {names}") from error
    chosen = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)
