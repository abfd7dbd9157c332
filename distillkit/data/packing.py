"""Documents to rows of at most `sequence_length` tokens. Every token gets into a row; none is cut off.

Packing is TRL's best-fit decreasing (Ding et al., Fewer Truncations Improve Language Modeling, 2024, arXiv 2404.10830),
with documents longer than a row split into pieces. The first token of a document, or piece of one, has no context in
its row, so it is not predicted: its label is -100. All other tokens are predicted.

Documents may have further columns with one list entry per token (a captured teacher's outputs). They move with their
tokens, as buffers of Arrow, because they are a hundred times as large as the tokens.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value, concatenate_datasets
from trl.data_utils import pack_dataset

from distillkit.config.errors import UserError
from distillkit.data.rows import DOCUMENT_FEATURES, list_entries, running_sums
from distillkit.models.labels import IGNORED_LABEL

ROW_FEATURES = Features({**DOCUMENT_FEATURES, "seq_lengths": List(Value("int32"))})

_TOKENS_PACKED_AT_ONCE = 2**24
_VALUES_MOVED_AT_ONCE = 2**28
_MOST_VALUES = 2**31 - 1  # of a column in a batch: 32-bit integers count its lists


def pack_documents(documents: Dataset, sequence_length: int) -> Dataset:
    """Several documents per row, in columns `input_ids`, `labels`, `seq_lengths` and any further ones."""
    at_once = max(_TOKENS_PACKED_AT_ONCE, 64 * sequence_length)  # enough that a few unfilled rows do not matter
    if (width := _values_per_token(documents)) > 1:
        at_once = max(_VALUES_MOVED_AT_ONCE // width, 64 * sequence_length)
    map_kwargs = {"batch_size": _batch_size(documents, at_once), "desc": "packing"}
    return _mask_first_tokens(pack_dataset(documents, sequence_length, "bfd_split", map_kwargs))


def split_documents(documents: Dataset, sequence_length: int) -> Dataset:
    """One document, or piece of one, per row."""

    def split(table: pa.Table) -> pa.Table:
        lengths = pc.list_value_length(table["input_ids"]).to_numpy()
        pieces = piece_lengths(lengths, sequence_length)
        columns = {name: relisted(table[name], pieces) for name in table.column_names}
        return pa.table({**columns, "seq_lengths": _single_documents(pieces)})

    features = Features({**documents.features, "seq_lengths": ROW_FEATURES["seq_lengths"]})
    at_once = min(_TOKENS_PACKED_AT_ONCE, _VALUES_MOVED_AT_ONCE // _values_per_token(documents))
    batch_size = _batch_size(documents, at_once)
    rows = documents.with_format("arrow").map(
        split, batched=True, batch_size=batch_size, features=features, desc="splitting"
    )
    return _mask_first_tokens(rows.with_format(None))


def keep_rows(rows: Dataset, boundaries: Dataset | None, sequence_length: int, key: str) -> Dataset:
    """Rows that were packed elsewhere, as they are.

    boundaries: column `seq_lengths` of the same rows; without it each row is one document.
    """

    def bounds(table: pa.Table, indices: list[int]) -> pa.Table:
        lengths = pc.list_value_length(table["input_ids"]).to_numpy()
        sums, seq_lengths = lengths, _single_documents(lengths)
        if boundaries is not None:
            seq_lengths = table["seq_lengths"]
            _, sums = document_lengths(seq_lengths)
        wrong = np.flatnonzero((lengths > sequence_length) | (sums != lengths))
        if len(wrong):
            index, length, total = indices[wrong[0]], lengths[wrong[0]], sums[wrong[0]]
            if length > sequence_length:
                raise UserError(key, f"row {index} has {length} tokens, more than sequence_length ({sequence_length})")
            raise UserError(key, f"row {index} has {length} tokens, but its seq_lengths add up to {total}")
        return pa.table({"seq_lengths": seq_lengths})

    if boundaries is not None and len(boundaries) != len(rows):
        raise UserError(key, "has rows without tokens; remove them")
    tokens = rows.select_columns("input_ids")
    looked_at = tokens if boundaries is None else concatenate_datasets([tokens, boundaries], axis=1)
    features = Features({"seq_lengths": ROW_FEATURES["seq_lengths"]})
    checked = looked_at.with_format("arrow").map(
        bounds, batched=True, with_indices=True, features=features, desc="checking rows"
    )
    return _mask_first_tokens(concatenate_datasets([rows, checked.with_format(None)], axis=1))


def refuse_packed_rows(rows: Dataset, key: str) -> None:
    """Raises `UserError` where a row of tokens holds several documents, which would be read as one."""
    if not {"input_ids", "seq_lengths"} <= set(rows.column_names):
        return
    start = 0
    for batch in rows.select_columns("seq_lengths").with_format("arrow").iter(batch_size=1000):
        several = np.flatnonzero(pc.list_value_length(batch["seq_lengths"]).fill_null(0).to_numpy() > 1)
        if len(several):
            raise UserError(
                key,
                f"row {start + int(several[0])} holds several documents; set dataset.prepacked: true, so that rows "
                "stay as they are",
            )
        start += len(batch)


def count_tokens(rows: Dataset) -> int:
    """Number of tokens in column `input_ids`."""
    batches = rows.select_columns("input_ids").with_format("arrow").iter(batch_size=1000)
    return sum(pc.sum(pc.list_value_length(batch["input_ids"])).as_py() for batch in batches)


def any_counts(rows: Dataset) -> bool:
    """Whether a label of any row counts. Reads no further than the first that does."""
    batches = rows.select_columns("labels").with_format("arrow").iter(batch_size=100)
    return any(pc.any(pc.not_equal(pc.list_flatten(batch["labels"]), IGNORED_LABEL)).as_py() for batch in batches)


def piece_lengths(lengths: np.ndarray, sequence_length: int) -> np.ndarray:
    """Lengths of the pieces of documents: each is as long as a row, except the last of each document."""
    pieces = -(-lengths // sequence_length)
    split = np.full(pieces.sum(), sequence_length)
    split[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * sequence_length
    return split


def document_lengths(seq_lengths: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of all documents, and for each row their sum."""
    counts, parts = list_entries(seq_lengths)
    parts = parts.cast(pa.int64()).to_numpy(zero_copy_only=False)
    return parts, np.diff(running_sums(parts)[running_sums(counts)])


def relisted(column: pa.ChunkedArray, lengths: np.ndarray) -> pa.ListArray:
    """The entries of all lists of a column, in lists of other lengths."""
    lists = pa.concat_arrays(column.chunks)
    offsets = running_sums(lengths).astype(lists.offsets.type.to_pandas_dtype())
    return type(lists).from_arrays(offsets, lists.flatten())


def _single_documents(lengths: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(np.arange(len(lengths) + 1, dtype=np.int32), lengths.astype(np.int32))


def _values_per_token(documents: Dataset) -> int:
    """Values per token of the widest further column; 1 where there are only tokens."""
    further = documents.remove_columns(list(DOCUMENT_FEATURES))
    if not further.column_names:
        return 1
    first = further.with_format("arrow")[:1]
    return max(1, *(len(pa.concat_arrays(first[name].chunks)[0].values[0]) for name in first.column_names))


def _batch_size(documents: Dataset, tokens: int) -> int:
    """Number of documents with about `tokens` tokens; with further columns, never more values than a batch can hold."""
    wanted = max(1, len(documents) * tokens // count_tokens(documents))
    width = _values_per_token(documents)
    if width == 1:
        return wanted
    lengths = documents.select_columns("input_ids").with_format("arrow").iter(batch_size=1000)
    longest = max(pc.max(pc.list_value_length(batch["input_ids"])).as_py() for batch in lengths)
    return max(1, min(wanted, _MOST_VALUES // (longest * width)))


def _mask_first_tokens(rows: Dataset) -> Dataset:
    """The label of each document's first token becomes -100. The other columns are not copied."""

    def mask(table: pa.Table) -> pa.Table:
        lengths = pa.concat_arrays(table["seq_lengths"].chunks).flatten().to_numpy()
        labels = pa.concat_arrays(table["labels"].chunks)
        values = labels.flatten().to_numpy().copy()
        values[np.cumsum(lengths) - lengths] = IGNORED_LABEL
        offsets = labels.offsets.to_numpy()
        masked = type(labels).from_arrays(pa.array(offsets - offsets[0]), pa.array(values))
        return table.set_column(table.column_names.index("labels"), "labels", masked)

    batch_size = _batch_size(rows.select_columns(list(DOCUMENT_FEATURES)), _TOKENS_PACKED_AT_ONCE)
    names = ["labels", "seq_lengths"]
    features = Features({name: ROW_FEATURES[name] for name in names})
    masked = (
        rows.select_columns(names)
        .with_format("arrow")
        .map(mask, batched=True, batch_size=batch_size, features=features, desc="marking documents")
    )
    return concatenate_datasets([rows.remove_columns(names), masked.with_format(None)], axis=1)
