"""Documents to rows of at most `sequence_length` tokens. Every token gets into a row; none is cut off.

Packing is TRL's best-fit decreasing (Ding et al., Fewer Truncations Improve Language Modeling, 2024, arXiv 2404.10830),
with documents longer than a row split into pieces. The first token of a document, or piece of one, has no context in
its row, so it is nobody's target: its label is -100. What remains are exactly the tokens that are predicted.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value, concatenate_datasets
from trl.data_utils import pack_dataset

from distillkit.config.errors import UserError
from distillkit.data.rows import DOCUMENT_FEATURES, IGNORED, Batch

ROW_FEATURES = Features({**DOCUMENT_FEATURES, "seq_lengths": List(Value("int32"))})

_TOKENS_PACKED_AT_ONCE = 2**24


def pack_documents(documents: Dataset, sequence_length: int) -> Dataset:
    """Several documents per row, in columns `input_ids`, `labels` and `seq_lengths`."""
    at_once = max(_TOKENS_PACKED_AT_ONCE, 64 * sequence_length)  # so many that a few rows left unfilled do not count
    batch_size = max(1, len(documents) * at_once // count_tokens(documents))
    map_kwargs = {"batch_size": batch_size, "desc": "packing"}
    return _mask_first_tokens(pack_dataset(documents, sequence_length, "bfd_split", map_kwargs))


def split_documents(documents: Dataset, sequence_length: int) -> Dataset:
    """One document, or piece of one, per row."""

    def split(batch: Batch) -> Batch:
        pieces: Batch = {
            name: [
                values[i : i + sequence_length]
                for values in batch[name]
                for i in range(0, len(values), sequence_length)
            ]
            for name in ("input_ids", "labels")
        }
        return {**pieces, "seq_lengths": [[len(piece)] for piece in pieces["input_ids"]]}

    return _mask_first_tokens(documents.map(split, batched=True, features=ROW_FEATURES, desc="splitting"))


def keep_rows(rows: Dataset, boundaries: Dataset | None, sequence_length: int, key: str) -> Dataset:
    """Rows that were packed elsewhere, as they are.

    boundaries: column `seq_lengths` of the same rows; without it each row is one document.
    """

    def check(batch: Batch, indices: list[int]) -> Batch:
        lengths = [len(input_ids) for input_ids in batch["input_ids"]]
        seq_lengths = batch.get("seq_lengths", [[length] for length in lengths])
        for index, length, parts in zip(indices, lengths, seq_lengths, strict=True):
            if length > sequence_length:
                raise UserError(
                    f"{key}: row {index} has {length} tokens, more than sequence_length ({sequence_length})"
                )
            if sum(parts) != length:
                raise UserError(f"{key}: row {index} has {length} tokens, but its seq_lengths add up to {sum(parts)}")
        return {**batch, "seq_lengths": seq_lengths}

    if boundaries is not None:
        if len(boundaries) != len(rows):
            raise UserError(f"{key}: has rows without tokens; remove them")
        rows = concatenate_datasets([rows, boundaries], axis=1)
    checked = rows.map(check, batched=True, with_indices=True, features=ROW_FEATURES, desc="checking rows")
    return _mask_first_tokens(checked)


def count_tokens(rows: Dataset) -> int:
    """Number of tokens in column `input_ids`."""
    batches = rows.select_columns("input_ids").with_format("arrow").iter(batch_size=1000)
    return sum(pc.sum(pc.list_value_length(batch["input_ids"])).as_py() for batch in batches)


def _mask_first_tokens(rows: Dataset) -> Dataset:
    def mask(table: pa.Table) -> pa.Table:
        labels = pa.concat_arrays(table["labels"].chunks)
        lengths = pa.concat_arrays(table["seq_lengths"].chunks).flatten().to_numpy()
        values = labels.flatten().to_numpy().copy()
        values[np.cumsum(lengths) - lengths] = IGNORED
        offsets = labels.offsets.to_numpy()
        masked = type(labels).from_arrays(pa.array(offsets - offsets[0]), pa.array(values))
        return table.set_column(table.column_names.index("labels"), "labels", masked)

    masked = rows.with_format("arrow").map(mask, batched=True, features=ROW_FEATURES, desc="marking documents")
    return masked.with_format(None)
