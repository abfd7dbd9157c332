"""Tokenised documents: made from any source of text, and written as parquet files."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from transformers import PreTrainedTokenizerBase

from distillkit.config.data import DatasetSource
from distillkit.config.errors import UserError
from distillkit.config.section import Section
from distillkit.data.rows import RowFormat, list_entries, tokenize_rows
from distillkit.data.sources import load_source
from distillkit.data.synthetic.rewriting import table_of_documents
from distillkit.runs.provenance import versions
from distillkit.runs.secrets import without_secrets


def tokenize_documents(
    source: DatasetSource, tokenizer: PreTrainedTokenizerBase, num_proc: int | None = None, key: str = "dataset"
) -> pa.Table:
    """The documents of a source in one column `input_ids`, in two bytes per token if the vocabulary allows it.

    A text ends with the tokenizer's EOS token, as in a run. key: the key of the YAML that holds the source, for errors.
    """
    documents = tokenize_rows(load_source(source, key), tokenizer, RowFormat(), num_proc=num_proc, key=key)
    if not len(documents):
        raise UserError(key, "holds no text")
    lengths, ids = list_entries(documents.with_format("arrow")[:]["input_ids"])
    return table_of_documents(lengths, ids.cast(token_type(len(tokenizer))))


def token_type(vocabulary_size: int) -> pa.DataType:
    """Two bytes per token if the vocabulary allows it."""
    return pa.uint16() if vocabulary_size <= 2**16 else pa.int32()


def settings_text(config: Section, *packages: str) -> str:
    """YAML from which the same text can be made again, and the versions of what made it."""
    settings = yaml.safe_dump(without_secrets(config.model_dump(mode="json", exclude_none=True)), sort_keys=False)
    made_with = ", ".join(f"{name} {version}" for name, version in versions(*packages).items())
    return f"# made with {made_with}\n{settings}"


def count_tokens(documents: pa.Table) -> int:
    return int(list_entries(documents["input_ids"])[0].sum())


def write_documents(documents: pa.Table, path: Path, compression_level: int = 3) -> int:
    """Write one parquet file and return its size in bytes.

    Everything is one row group in pages as large as possible, so that zstd finds repetitions far back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        documents,
        path,
        compression="zstd",
        compression_level=compression_level,
        use_dictionary=False,
        write_statistics=False,
        row_group_size=max(len(documents), 1),
        data_page_size=2**30,
    )
    return path.stat().st_size


def write_parts(documents: pa.Table, folder: Path, max_bytes: int, compression_level: int = 9) -> list[Path]:
    """Write `part-00.parquet`, `part-01.parquet` …: as few files of about equal tokens as keep each below `max_bytes`.

    Documents keep their order and are not divided, so a file of one document may be larger. zstd's level 19 makes files
    an eighth smaller than 9 does, in 30 times its time: minutes on one core for 70 million tokens.
    """
    ends = np.cumsum(list_entries(documents["input_ids"])[0])
    parts = 1
    while True:
        stops = np.unique(np.searchsorted(ends, ends[-1] * np.arange(1, parts + 1) / parts)) + 1
        paths = [folder / f"part-{part:02}.parquet" for part in range(len(stops))]
        sizes = [
            write_documents(documents.slice(start, stop - start), path, compression_level)
            for path, start, stop in zip(paths, [0, *stops[:-1]], stops, strict=True)
        ]
        if max(sizes) <= max_bytes or parts >= len(documents):
            return paths
        parts = min(max(parts + 1, math.ceil(sum(sizes) / max_bytes)), len(documents))
        for path in paths:
            path.unlink()
