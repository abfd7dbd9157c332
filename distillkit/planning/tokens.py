"""How much is trained: tokens and steps of a budget, and how much text there is, without reading any of it."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from distillkit.config import RunConfig
from distillkit.config.data import DatasetConfig
from distillkit.data.sources import local_files
from distillkit.planning.settings import Settings
from distillkit.shards import read_manifest

BYTES_PER_TOKEN = 4.0
"""Of English text in UTF-8, for vocabularies of 49k (3.9 on the project's corpus) to 128k tokens (4.4)."""


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
    """The schedule of a run whose rows are full; where they are not packed there are fewer tokens in a step."""
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
        files = local_files(source.disk_path)
        size, rows = _text_bytes(files, dataset.dataset_text_field)
    except (OSError, ValueError):  # pyarrow's errors are both
        return None
    found = _of_samples(int(size / BYTES_PER_TOKEN), rows, dataset, estimated=True)
    return found if source.split is None or "[" not in source.split else None


def _of_samples(tokens: int, rows: int, dataset: DatasetConfig, *, estimated: bool) -> Amount:
    if dataset.num_samples is not None and rows:
        tokens = int(tokens * min(dataset.num_samples / rows, 1))
    return Amount(tokens, estimated)


def _text_bytes(files: list[str], column: str) -> tuple[int, int]:
    """Bytes of text, and rows where the files tell them."""
    size = rows = 0
    for file in files:
        kind = os.path.splitext(file)[1]
        if kind == ".parquet":
            metadata = pq.ParquetFile(file).metadata
            rows += metadata.num_rows
            size += _column_bytes(metadata, column)
        elif kind in (".jsonl", ".json", ".txt", ".arrow"):
            size += os.path.getsize(file)
    if size == 0:
        raise ValueError("no text")
    return size, rows


def _column_bytes(metadata: pq.FileMetaData, column: str) -> int:
    """Uncompressed bytes of a column, or of all where there is no such (conversations, tokens)."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    sizes = [
        (chunk.path_in_schema.split(".")[0], chunk.total_uncompressed_size)
        for group in groups
        for chunk in (group.column(index) for index in range(group.num_columns))
    ]
    named = [size for name, size in sizes if name == column]
    return sum(named) if named else sum(size for _, size in sizes)
