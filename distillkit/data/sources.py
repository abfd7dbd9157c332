"""Rows as they are stored: a dataset of the hub, a folder of `save_to_disk`, or files. Columns are checked later.

Splits and parts of splits (`train[:1000]`) work for all of them. Nothing is written beside the user's files; the
datasets library converts files in its own cache. What a folder says of itself (README.md, `manifest.json`,
`state.json`) may be somebody else's word: it chooses among the folder's own files and nothing else.
"""

import glob
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import datasets
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq
import yaml
from datasets import Dataset, DatasetDict, Features, ReadInstruction
from datasets.data_files import FILES_TO_IGNORE, _get_data_files_patterns, sanitize_patterns
from datasets.exceptions import DatasetsError
from datasets.utils.metadata import MetadataConfigs
from fsspec.utils import glob_translate
from huggingface_hub import metadata_load

from distillkit.config.data import DatasetSource
from distillkit.config.errors import UserError
from distillkit.shards import read_manifest
from distillkit.shards.names import CARD, PLAN, SHARD, inside

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
    place = f"{key}.{'disk_path' if source.disk_path is not None else 'repo_id'}"
    try:
        splits = _local_splits(named) if local else _hub_splits(source)
    except (StopIteration, IndexError) as error:  # what the datasets library raises for files without rows
        raise UserError(place, f"cannot read {named!r}: it has no rows") from error
    except (OSError, ValueError, pa.ArrowException, DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UserError(place, f"cannot read {named!r}: {reason}") from error
    rows = _choose_split(splits, source.split, named, f"{key}.split")
    if len(rows) == 0:
        raise UserError(place, f"cannot read {named!r}: it has no rows")
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


def _local_splits(path: str) -> DatasetDict:
    if os.path.isfile(os.path.join(path, "dataset_dict.json")) or os.path.isfile(os.path.join(path, "state.json")):
        return _saved(Path(path))
    if os.path.isdir(path) and (manifest := read_manifest(Path(path))) is not None:  # a captured dataset
        return _read("parquet", {"train": [os.path.join(path, shard.file) for shard in manifest.shards]})
    if os.path.isfile(os.path.join(path, PLAN)) and glob.glob(os.path.join(glob.escape(path), f"{SHARD}*")):
        raise ValueError("its capture is not finished; run the same distillkit capture again to complete it")
    found = local_files(path)
    if not found:
        raise ValueError("there is no such file or folder, or it is empty")
    files = {"train": found}
    if os.path.isdir(path):
        files = _files_of_folder(path, [os.path.relpath(name, path) for name in found])
    kinds = sorted({LOADERS.get(os.path.splitext(name)[1], "") for names in files.values() for name in names})
    if not kinds or "" in kinds:
        raise ValueError(f"files must be {', '.join(LOADERS)}, or a folder of save_to_disk")
    if len(kinds) > 1:
        raise ValueError(f"it holds {' and '.join(kinds)} files; name one kind by a pattern such as {path}/*.txt")
    return _read(kinds[0], files)


def _saved(folder: Path) -> DatasetDict:
    """A folder of `save_to_disk`, whose JSON names no file outside of it."""
    parts = [folder]
    try:
        if (folder / "dataset_dict.json").is_file():
            content = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))
            parts = [inside(folder, name, "dataset_dict.json") for name in content["splits"]]
        for part in parts:
            for file in json.loads((part / "state.json").read_text(encoding="utf-8"))["_data_files"]:
                inside(part, file["filename"], "state.json")
        saved = datasets.load_from_disk(folder).with_format(None)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is damaged, or was not written by save_to_disk ({error!r})") from error
    return saved if isinstance(saved, DatasetDict) else DatasetDict({str(saved.split or "train"): saved})


def _files_of_folder(folder: str, names: list[str]) -> dict[str, list[str]]:
    """The data files of each split: those that README.md lists, as in a dataset of the hub, else by their names."""
    kept = [
        name
        for name in names
        if os.path.splitext(name)[1] in LOADERS
        and os.path.basename(name) not in FILES_TO_IGNORE
        and not any(part.startswith((".", "__")) for part in PurePosixPath(name).parts[:-1])
    ]

    def matching(pattern: str) -> list[str]:
        matched = re.compile(glob_translate(pattern)).match
        return [name for name in kept if name == pattern or matched(name)]

    listed = _listed_files(folder)
    patterns = listed or _patterns_by_name(matching)
    files = {}
    for split, of_split in patterns.items():
        if listed:
            of_split = [os.path.normpath(inside(Path(folder), name, CARD).relative_to(folder)) for name in of_split]
        chosen = dict.fromkeys(name for pattern in of_split for name in matching(pattern))
        if not chosen:
            raise ValueError(f"{CARD} lists {', '.join(of_split)} for {split}, but there is no such file")
        files[str(split)] = [str(inside(Path(folder), name, CARD) if listed else Path(folder, name)) for name in chosen]
    return files


def _listed_files(folder: str) -> dict[str, list[str]]:
    """Patterns of files by split, where the head of README.md has `data_files`; empty where it has none.

    Raises ValueError where it describes several datasets.
    """
    card = Path(folder, CARD)
    if not card.is_file():
        return {}
    try:
        configs = MetadataConfigs.from_dataset_card_data(metadata_load(card) or {})
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise ValueError(f"the head of {CARD} is no YAML of a dataset: {error}") from error
    if not configs:
        return {}
    if len(configs) > 1 and configs.get_default_config_name() is None:
        raise ValueError(f"{CARD} describes the datasets {', '.join(configs)}; name the files of one by a pattern")
    config = configs[configs.get_default_config_name() or next(iter(configs))]
    below = str(config.get("data_dir") or "")
    data_files = config.get("data_files", "**" if below else None)
    if data_files is None:
        return {}
    patterns = sanitize_patterns(data_files)
    return {str(split): [os.path.join(below, name) for name in names] for split, names in patterns.items()}


def _patterns_by_name(matching: Callable[[str], list[str]]) -> dict[str, list[str]]:
    try:
        return _get_data_files_patterns(matching)
    except FileNotFoundError:
        return {}


def _read(kind: str, files: dict[str, list[str]]) -> DatasetDict:
    """The rows of files of one kind. Their names are no patterns, and no file speaks for the columns of the others."""
    for name in (name for names in files.values() for name in names if kind == "json"):
        _refuse_null(name)
    data_files = {split: [glob.escape(name) for name in names] for split, names in files.items()}
    options = {"sample_by": "document"} if kind == "text" else {}  # a file is a document, not each of its lines
    try:
        return datasets.load_dataset(kind, data_files=data_files, **options)
    except DatasetsError:
        features = _common_features(kind, [name for names in files.values() for name in names])
        if features is None:
            raise
    return datasets.load_dataset(kind, data_files=data_files, features=features)


def _common_features(kind: str, files: list[str]) -> Features | None:
    """Columns that hold those of all files: one that is empty in a file has the type that it has elsewhere.

    None where there are none: the same column has another type in another file.
    """
    read = {"parquet": lambda name: [pq.read_schema(name)], "json": _schemas_of_json}.get(kind)
    if read is None:
        return None
    try:
        schemas = [schema for name in files for schema in read(name)]
        return Features.from_arrow_schema(pa.unify_schemas(schemas, promote_options="permissive").remove_metadata())
    except (pa.ArrowException, ValueError):
        return None


def _schemas_of_json(file: str) -> list[pa.Schema]:
    """The columns of each stretch of a file of JSON lines."""
    schemas = []
    with open(file, "rb") as lines:
        while content := lines.read(_JSON_AT_ONCE):
            content += lines.readline()
            whole = pyarrow.json.ReadOptions(block_size=len(content) + 1)
            schemas.append(pyarrow.json.read_json(io.BytesIO(content), read_options=whole).schema)
    return schemas


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
