"""Prepared rows kept on disk for the next run, with a record of what they were made from."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from filelock import FileLock

from distillkit.config.errors import UserError
from distillkit.data.sources import local_files

logger = logging.getLogger(__name__)

_RECORD = "made_from.json"


def load_or_prepare(folder: Path, made_from: dict[str, Any], prepare: Callable[[], Dataset]) -> Dataset:
    """The rows in `folder` if they were made from the same inputs; otherwise they are prepared and saved there.

    A folder is complete or absent, whenever the process is killed; of several processes one prepares and the others
    wait. Raises `UserError` for a folder that holds something else, which is never changed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        kept = _read_record(folder)
        if kept != made_from:
            if kept is not None:
                changed = sorted(name for name in made_from if made_from[name] != kept.get(name))
                logger.warning("%s is prepared again, because these have changed: %s", folder, ", ".join(changed))
            _replace(folder, made_from, prepare)
    rows = datasets.load_from_disk(folder)
    assert isinstance(rows, Dataset)
    return rows


def file_states(path: str) -> list[tuple[str, int, int]]:
    """Name, size and modification time of the files of `disk_path`, which differ once a file has changed."""
    states = [(name, os.stat(name)) for name in local_files(path)]
    return [(os.path.relpath(name, path), state.st_size, state.st_mtime_ns) for name, state in states]


def _read_record(folder: Path) -> dict[str, Any] | None:
    if (folder / _RECORD).is_file():
        record: dict[str, Any] = json.loads((folder / _RECORD).read_text())
        return record
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("dataset.prepared_dataset_path", f"{folder} holds something else; name a new folder")
    return None


def _replace(folder: Path, made_from: dict[str, Any], prepare: Callable[[], Dataset]) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    prepare().save_to_disk(partial)
    (partial / _RECORD).write_text(json.dumps(made_from, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
