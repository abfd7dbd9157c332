"""How much is trained: tokens and steps of a budget, and how much text there is, without tokenising it."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distillkit.config import RunConfig
from distillkit.config.data import DatasetConfig
from distillkit.data.sources import local_files
from distillkit.planning.settings import Settings
from distillkit.shards import read_manifest

BYTES_PER_TOKEN = 4.0
"""Of English text in UTF-8, for vocabularies of 49k (3.9 on the project's corpus) to 128k tokens (4.4)."""

TOKENS = "input_ids"
"""The column of rows that are tokenised already; it comes before text (`data.rows`)."""

SAVED_BESIDE = ("dataset_dict.json", "dataset_info.json", "state.json")
"""What `save_to_disk` writes beside its rows."""


@dataclass(frozen=True)
class Amount:
    """Tokens of a dataset. estimated: from the size of its text, and not counted."""

    tokens: int
    estimated: bool


@dataclass(frozen=True)
class Schedule:
    """For how long a run trains, over all GPUs. What is not known is None: a dataset of the hub tells nothing."""

    tokens_per_step: int
    steps: int | None
    tokens: int | None
    available: Amount | None
    """What the dataset holds."""

    @property
    def passes(self) -> float | None:
        """How many times the data is read."""
        if self.tokens is None or self.available is None:
            return None
        return self.tokens / max(self.available.tokens, 1)


def schedule(config: RunConfig, settings: Settings, gpus: int) -> Schedule:
    """The schedule of a run whose rows are full; where they are not packed there are fewer tokens in a step.

    gpus: those that read rows of their own.
    """
    per_step = settings.batch_size * settings.accumulation * gpus * config.sequence_length
    available = amount(config.dataset)
    if config.tokens is not None:
        steps: int | None = max(round(config.tokens / per_step), 1)
    elif settings.max_steps > 0:
        steps = settings.max_steps
    elif available is not None:
        steps = max(math.ceil(settings.num_train_epochs * available.tokens / per_step), 1)
    else:
        steps = None
    return Schedule(per_step, steps, None if steps is None else steps * per_step, available)


def amount(dataset: DatasetConfig) -> Amount | None:
    """Tokens of the training text, as sizes of local files tell; None for a dataset of the hub."""
    source = dataset.train_dataset
    if source.disk_path is None:
        return None
    if (manifest := read_manifest(Path(source.disk_path))) is not None:
        return _of_samples(manifest.tokens, manifest.rows, dataset, estimated=dataset.num_samples is not None)
    try:
        held = [_of_file(file, dataset.dataset_text_field) for file in local_files(source.disk_path)]
    except (OSError, ValueError):  # pyarrow's errors are both
        return None
    known = [each for each in held if each is not None]
    if not known or (source.split is not None and "[" in source.split):
        return None
    rows = None if any(each.rows is None for each in known) else sum(each.rows or 0 for each in known)
    if dataset.num_samples is not None and not rows:
        return None
    counted = all(each.counted for each in known) and dataset.num_samples is None
    return _of_samples(sum(each.tokens for each in known), rows or 0, dataset, estimated=not counted)


def _of_samples(tokens: int, rows: int, dataset: DatasetConfig, *, estimated: bool) -> Amount:
    if dataset.num_samples is not None and rows:
        tokens = int(tokens * min(dataset.num_samples / rows, 1))
    return Amount(tokens, estimated)


@dataclass(frozen=True)
class _Held:
    """What a file holds. rows is None where they cannot be counted; counted: tokens are, and not their text's bytes."""

    tokens: int
    rows: int | None
    counted: bool


def _of_file(file: str, column: str) -> _Held | None:
    """None for a file of another kind. Raises `ValueError` where its rows are tokens that cannot be counted."""
    kind = os.path.splitext(file)[1]
    if kind == ".parquet":
        return _of_parquet(pq.ParquetFile(file).metadata, column)
    if kind == ".arrow":
        return _of_arrow(file, column)
    if kind not in (".jsonl", ".json", ".txt") or os.path.basename(file) in SAVED_BESIDE:
        return None
    with open(file, "rb") as lines:
        start = lines.read(2**16)
        rows = (
            None if kind == ".json" and start.lstrip().startswith(b"[") else sum(1 for _ in lines) + start.count(b"\n")
        )
    if b'"input_ids"' in start and kind != ".txt":
        raise ValueError("tokens as text")
    return _Held(int(os.path.getsize(file) / BYTES_PER_TOKEN), rows, counted=False)


def _of_parquet(metadata: pq.FileMetaData, column: str) -> _Held:
    """From the footer: values of `input_ids`, or uncompressed bytes of the text, of all columns where there is none."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
    of_column: dict[str, list[Any]] = {}
    for chunk in chunks:
        of_column.setdefault(chunk.path_in_schema.split(".")[0], []).append(chunk)
    if TOKENS in of_column:
        return _Held(sum(chunk.num_values for chunk in of_column[TOKENS]), metadata.num_rows, counted=True)
    size = sum(chunk.total_uncompressed_size for chunk in of_column.get(column, chunks))
    return _Held(int(size / BYTES_PER_TOKEN), metadata.num_rows, counted=False)


def _of_arrow(file: str, column: str) -> _Held:
    """From the offsets of a mapped file, as the datasets library writes it."""
    with pa.memory_map(file) as mapped:
        table = pa.ipc.open_stream(mapped).read_all()
        if TOKENS in table.column_names:
            tokens = pc.sum(pc.list_value_length(table[TOKENS])).as_py() or 0
            return _Held(tokens, table.num_rows, counted=True)
        size = (table.select([column]) if column in table.column_names else table).nbytes
        return _Held(int(size / BYTES_PER_TOKEN), table.num_rows, counted=False)
