"""Held-out text as rows of tokens, and in batches."""

from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distillkit.config.evaluate import DivergenceConfig
from distillkit.data import build_dataset, collate
from distillkit.data.signals import TensorRows
from distillkit.data.sources import load_source
from distillkit.teacher import Teacher

KEY = "divergence.dataset"


def held_out_rows(
    settings: DivergenceConfig, tokenizer: PreTrainedTokenizerBase, prepared_path: Path | None = None
) -> Dataset:
    """The text of an evaluation, shuffled and packed as in a run; rows that are packed already are kept.

    prepared_path: folder that keeps the rows.

    Raises `UserError` for any problem with the text.
    """
    packed_already = {"input_ids", "seq_lengths"} <= set(load_source(settings.dataset, KEY).column_names)
    return build_dataset(
        settings.dataset,
        tokenizer,
        settings.sequence_length,
        seed=settings.seed,
        prepacked=packed_already,
        text_field=settings.text_field,
        prepared_path=prepared_path,
        key=KEY,
    )


def held_out_batches(rows: Dataset, batch_size: int = 1, teacher: Teacher | None = None) -> Iterator[dict[str, Tensor]]:
    """Batches of the rows, in their order, with what the teacher needs."""
    columns = () if teacher is None else teacher.columns
    read = TensorRows(rows, columns)
    for start in range(0, len(rows), batch_size):
        chosen = read.__getitems__(list(range(start, min(start + batch_size, len(rows)))))
        batch = collate(chosen, pad_token_id=0, signal_columns=columns)
        yield batch if teacher is None else teacher.prepare(batch)
