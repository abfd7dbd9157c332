"""From `dataset` in the YAML to rows of tokens: read, shuffle, select, tokenise, pack, keep."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distillkit.config.data import DatasetConfig, DatasetSource
from distillkit.config.errors import UserError
from distillkit.data.packing import (
    any_counts,
    count_tokens,
    keep_rows,
    pack_documents,
    refuse_packed_rows,
    split_documents,
)
from distillkit.data.prepared import file_states, load_or_prepare
from distillkit.data.rows import RowFormat, holds_conversations, tokenize_rows
from distillkit.data.signals import aligned_rows
from distillkit.data.sources import load_source
from distillkit.models.vocabulary import tokenizer_state

logger = logging.getLogger(__name__)

_VERSION = 2
"""Version of the rows on disk, increased when the same configuration gives other rows than before."""

_HELD_OUT_SEED = 42


@dataclass(frozen=True)
class Preparation:
    """Everything that decides the rows, besides source and tokenizer."""

    sequence_length: int
    seed: int | None
    num_samples: int | None
    packing: bool
    prepacked: bool
    row_format: RowFormat
    signal_columns: tuple[str, ...] = ()


class TokenisedTexts:
    """Documents that one phase of a run has tokenised, for those that read the same text in another order."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Dataset, np.ndarray]] = {}

    def documents(self, made_from: str, order: np.ndarray, tokenise: Callable[[], Dataset]) -> Dataset:
        """What `tokenise` gives, or gave for the same text: one document for each row that is not empty.

        order: numbers of the rows to be tokenised, in their order.
        """
        if made_from in self._kept:
            documents, kept = self._kept[made_from]
            places = np.full(1 + max(kept.max(), order.max()), -1)
            places[kept] = np.arange(len(kept))
            if (places[order] >= 0).all():
                return documents.select(places[order])
        documents = tokenise()
        if len(documents) == len(order):  # no row was empty: each document is known by its row
            self._kept[made_from] = documents, order
        return documents


def build_dataset(
    source: DatasetSource,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    seed: int | None = None,
    num_samples: int | None = None,
    packing: bool = True,
    prepacked: bool = False,
    text_field: str = "text",
    completion_only_loss: bool | None = None,
    eos_label_token_ids: list[int] | None = None,
    assistant_only_loss: bool = False,
    signal_columns: tuple[str, ...] = (),
    num_proc: int | None = None,
    prepared_path: Path | None = None,
    tokenised: TokenisedTexts | None = None,
    key: str = "dataset.train_dataset",
) -> Dataset:
    """Rows of one dataset, with the columns

    - `input_ids`: at most `sequence_length` tokens;
    - `seq_lengths`: lengths of the documents that make up the row, in order;
    - `labels`: the tokens again, -100 at the first of each document and where no loss counts;
    - those of `signal_columns`, each a list of numbers per token.

    seed: of the order of documents and rows; None keeps that of the source (rows, by decreasing document length).
    num_samples: number of rows of the source, after shuffling; all by default.
    packing: fill rows with several documents. Either way a document longer than a row is split, and none is lost.
    prepacked: rows are packed already (`input_ids`, perhaps `labels` and `seq_lengths`) and are kept as they are.
    eos_label_token_ids: token ids that become the EOS token in labels.
    assistant_only_loss: rows are conversations, and only the assistant's tokens count.
    signal_columns: columns of tokenised rows with a captured teacher's outputs at each token.
    num_proc: processes that tokenise; by default as many as pay, at most one for each CPU.
    prepared_path: folder that keeps the rows; they are prepared again when anything they depend on has changed.
    tokenised: keeps the documents for further calls.
    key: the key of the YAML that holds the source, for error messages.

    Raises `UserError` for any problem with the source, its rows or the tokenizer.
    """
    row_format = RowFormat(text_field, completion_only_loss, tuple(eos_label_token_ids or ()), assistant_only_loss)
    preparation = Preparation(sequence_length, seed, num_samples, packing, prepacked, row_format, signal_columns)

    def prepare() -> Dataset:
        return _prepare(source, tokenizer, preparation, num_proc, tokenised, key)

    if prepared_path is None:
        rows = prepare()
    else:
        rows = load_or_prepare(prepared_path, _made_from(source, tokenizer, preparation), prepare)
    if not any_counts(rows):
        raise UserError(
            key,
            "no token counts: all labels are -100, or no document has a second token (the first is never predicted); "
            "name text that has something to predict",
        )
    tokens = count_tokens(rows)
    filled = tokens / (len(rows) * sequence_length)
    logger.info("%s: %d rows of %d tokens, %.1f %% filled", key, len(rows), sequence_length, 100 * filled)
    return rows


def build_datasets(
    config: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    evaluation_source: DatasetSource | None = None,
    signal_columns: tuple[str, ...] = (),
    eval_signal_columns: tuple[str, ...] = (),
    tokenised: TokenisedTexts | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Training rows, and held-out rows if there is a dataset of them.

    evaluation_source: `evaluation.dataset`, which takes precedence over `dataset.eval_dataset`.
    signal_columns, eval_signal_columns: columns of a captured teacher's outputs in training and in held-out rows.
    tokenised: keeps the documents for further calls.
    """
    eval_key = "dataset.eval_dataset" if evaluation_source is None else "evaluation.dataset"
    eval_source = evaluation_source or config.eval_dataset
    # Phases and runs of other seeds are measured on the same rows.
    eval_seed = None if config.seed is None else _HELD_OUT_SEED

    def is_conversational(source: DatasetSource, key: str) -> bool:
        """A student of conversations may be measured on texts, in which every token counts."""
        return holds_conversations(load_source(source, key), config.dataset_text_field, key)

    def is_tokenised(source: DatasetSource, key: str) -> bool:
        """A student of packed rows may be measured on texts, which are packed here."""
        return "input_ids" in load_source(source, key).column_names

    def build(source: DatasetSource, num_samples: int | None, name: str, key: str) -> Dataset:
        folder = None if config.prepared_dataset_path is None else Path(config.prepared_dataset_path) / name
        return build_dataset(
            source,
            tokenizer,
            sequence_length,
            seed=config.seed if name == "train" else eval_seed,
            num_samples=num_samples,
            packing=config.packing,
            prepacked=config.prepacked and (name == "train" or is_tokenised(source, key)),
            text_field=config.dataset_text_field,
            completion_only_loss=config.completion_only_loss,
            eos_label_token_ids=config.eos_label_token_ids,
            assistant_only_loss=config.assistant_only_loss and (name == "train" or is_conversational(source, key)),
            signal_columns=signal_columns if name == "train" else eval_signal_columns,
            num_proc=config.dataset_num_proc,
            prepared_path=folder,
            tokenised=tokenised,
            key=key,
        )

    train = build(config.train_dataset, config.num_samples, "train", "dataset.train_dataset")
    if eval_source is None:
        return train, None
    return train, build(eval_source, config.num_eval_samples, "eval", eval_key)


def _prepare(
    source: DatasetSource,
    tokenizer: PreTrainedTokenizerBase,
    preparation: Preparation,
    num_proc: int | None,
    tokenised: TokenisedTexts | None,
    key: str,
) -> Dataset:
    rows = load_source(source, key)
    seed, sequence_length, signals = preparation.seed, preparation.sequence_length, list(preparation.signal_columns)
    with _temporary_files():
        # A captured teacher's outputs are large: rows are selected last of all, when that no longer copies them.
        source_rows = len(rows)
        rows = aligned_rows(rows, signals, key) if signals else _selected(rows, preparation)
        if preparation.prepacked and "input_ids" not in rows.column_names:
            raise UserError(key, "has no column input_ids; remove prepacked, so that rows are tokenised and packed")

        def tokenise() -> Dataset:
            return tokenize_rows(rows, tokenizer, preparation.row_format, num_proc=num_proc, key=key)

        if tokenised is None or signals or preparation.prepacked:
            documents = tokenise()
        else:
            numbers = Dataset.from_dict({"row": np.arange(source_rows)})
            order = _selected(numbers, preparation).with_format("numpy")[:]["row"]
            text = _text_of(source, tokenizer, preparation.row_format)
            documents = tokenised.documents(json.dumps(text), order, tokenise)
        if len(documents) == 0:
            raise UserError(key, "has only empty rows")
        if signals:
            documents = concatenate_datasets([documents, rows.select_columns(signals)], axis=1)
        if preparation.prepacked:
            boundaries = rows.select_columns("seq_lengths") if "seq_lengths" in rows.column_names else None
            kept = keep_rows(documents, boundaries, sequence_length, key)
            return _selected(kept, preparation) if signals else kept
        refuse_packed_rows(rows, key)
        if signals:
            documents = _selected(documents, preparation)
        packed = (pack_documents if preparation.packing else split_documents)(documents, sequence_length)
        # Packing sorts by length; without a shuffle the first rows would be no fair sample.
        return packed if seed is None else packed.shuffle(seed=seed)


def _selected(rows: Dataset, preparation: Preparation) -> Dataset:
    if preparation.seed is not None:
        rows = rows.shuffle(seed=preparation.seed)
    if preparation.num_samples is not None:
        rows = rows.select(range(min(preparation.num_samples, len(rows))))
    return rows


@contextmanager
def _temporary_files() -> Iterator[None]:
    """Inside, the datasets library caches in temporary files.

    Otherwise it would write into the user's folder, next to the files of a dataset.
    """
    enabled = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_caching()


def _made_from(source: DatasetSource, tokenizer: PreTrainedTokenizerBase, preparation: Preparation) -> dict[str, Any]:
    """Everything that rows depend on, as it is after a round trip through JSON."""
    text = _text_of(source, tokenizer, preparation.row_format)
    made_from = {"version": _VERSION, **text, **asdict(preparation)}
    restored: dict[str, Any] = json.loads(json.dumps(made_from))
    return restored


def _text_of(source: DatasetSource, tokenizer: PreTrainedTokenizerBase, row_format: RowFormat) -> dict[str, Any]:
    """Everything that documents depend on."""
    return {
        "source": source.model_dump(),
        "files": file_states(source.disk_path or source.repo_id or ""),
        "tokenizer": text_to_ids_hash(tokenizer),
        "row_format": asdict(row_format),
    }


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the mapping from tokens to ids: equal for tokenizers whose ids mean the same tokens.

    How a text is split into tokens, and the chat template, do not matter for ids that exist already.
    """
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def text_to_ids_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything in a tokenizer that decides the ids of a text."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        state: Any = tokenizer_state(tokenizer)
    else:
        state = sorted(tokenizer.get_vocab().items())
    whole = json.dumps([state, tokenizer.chat_template, tokenizer.eos_token_id])
    return hashlib.sha256(whole.encode()).hexdigest()
