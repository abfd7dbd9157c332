"""Rows of text, conversations or tokens become documents: `input_ids`, and `labels` that are -100 where no loss counts.

The formats and their handling are those of TRL's SFT trainer: chat templates are applied by TRL's functions, a text
ends with one EOS token, and of prompt and completion only the completion counts. `data.assistant` finds the assistant's
part of a conversation. Rows of tokens are read as buffers of Arrow, because there may be billions of them.
"""

import json
import logging
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase
from trl.data_utils import apply_chat_template, common_prefix_length, maybe_convert_to_chatml

from distillkit.config.errors import UserError, reading
from distillkit.data.assistant import assistant_encoder, training_template
from distillkit.data.workers import interruptions_as_they_are, one_thread_each, processes_for
from distillkit.models.labels import IGNORED_LABEL
from distillkit.models.special_tokens import encode_texts

logger = logging.getLogger(__name__)

DOCUMENT_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})

_EXTRA_COLUMNS = {
    "input_ids": ("labels", "attention_mask"),
    "messages": ("tools", "chat_template_kwargs"),
    "conversations": ("tools", "chat_template_kwargs"),
    "prompt": ("completion", "tools", "chat_template_kwargs"),
}
_ROLES = {"human": "user", "gpt": "assistant"}
_DOCUMENTS_AT_ONCE = 256

Batch = dict[str, list[Any]]


@dataclass(frozen=True)
class RowFormat:
    """How a row is read: the part of a dataset's configuration that concerns single rows."""

    text_field: str = "text"
    completion_only_loss: bool | None = None
    eos_label_token_ids: tuple[int, ...] = ()
    assistant_only_loss: bool = False


def tokenize_rows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, row_format: RowFormat, *, num_proc: int | None, key: str
) -> Dataset:
    """One document per row, of any length, in columns `input_ids` and `labels`; empty ones are dropped.

    num_proc: by default as many processes as pay, at most one for each CPU.

    Raises `UserError` where no column is an accepted one, and for rows that do not fit their column.
    """
    column = _content_column(rows.column_names, row_format.text_field, key)
    if row_format.assistant_only_loss and not holds_conversations(rows, row_format.text_field, key):
        raise UserError(
            key,
            f"column {column} holds no conversations, so dataset.assistant_only_loss has no effect on it; "
            "remove assistant_only_loss, or name a dataset of conversations",
        )
    if row_format.completion_only_loss and column != "prompt":
        logger.warning("%s: has no prompt and completion; dataset.completion_only_loss has no effect on it", key)
    wanted = [column, *(name for name in _EXTRA_COLUMNS.get(column, ()) if name in rows.column_names)]
    of_tokens = column == "input_ids"
    read: Callable[[Any], Flat] = (
        partial(_read_tokens, vocabulary=len(tokenizer), key=key)
        if of_tokens
        else partial(_read_documents, _reader(column, tokenizer, row_format, key))
    )
    _check_eos_labels(row_format.eos_label_token_ids, tokenizer)
    eos_token_id = _eos_token_id(tokenizer, key) if row_format.eos_label_token_ids else None

    owner = os.getpid()

    def tokenize(batch: Any) -> pa.Table:
        if os.getpid() != owner:  # Ctrl-C reaches all processes of a terminal; the owner ends the others
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        offsets, input_ids, labels = read(batch)
        if eos_token_id is not None:
            labels = np.where(np.isin(labels, row_format.eos_label_token_ids), np.int32(eos_token_id), labels)
        bounds = pa.array(np.unique(offsets), pa.int32())  # an empty document starts where the next one does
        columns = {"input_ids": input_ids, "labels": labels}
        return pa.table({name: pa.ListArray.from_arrays(bounds, values) for name, values in columns.items()})

    rows = rows.select_columns(wanted).with_format("arrow" if of_tokens else None)
    if num_proc is None and not of_tokens:
        num_proc = processes_for(rows)
    with one_thread_each(num_proc), interruptions_as_they_are():
        documents = rows.map(
            tokenize,
            batched=True,
            batch_size=_DOCUMENTS_AT_ONCE,
            remove_columns=wanted,
            features=DOCUMENT_FEATURES,
            num_proc=num_proc,
            desc="tokenising",
        )
    if row_format.assistant_only_loss and len(documents) < len(rows):
        _warn_of_missing_assistant(len(rows) - len(documents), len(rows), key)
    return documents.with_format(None)


def _warn_of_missing_assistant(silent: int, rows: int, key: str) -> None:
    """Warns of conversations without a token of the assistant's. Raises `UserError` where there are no others."""
    if silent == rows:
        raise UserError(
            key,
            "no conversation has text of the assistant, so no token would count; name another dataset, "
            "or remove dataset.assistant_only_loss",
        )
    logger.warning("%s: %d of %d conversations are left out: they have no text of the assistant", key, silent, rows)


def _check_eos_labels(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> None:
    for position, token_id in enumerate(token_ids):
        if not 0 <= token_id < len(tokenizer):
            raise UserError(
                f"dataset.eos_label_token_ids[{position}]",
                f"there is no token {token_id}; the tokenizer's ids are 0 to {len(tokenizer) - 1}",
            )


def holds_conversations(rows: Dataset, text_field: str, key: str) -> bool:
    """Whether rows are messages of several roles, rather than texts or tokens."""
    column = _content_column(rows.column_names, text_field, key)
    if column != "prompt":
        return column in ("messages", "conversations")
    return isinstance(next((prompt for prompt in rows[column] if prompt is not None), None), list)


Document = tuple[list[int], list[int]]
"""`input_ids` and `labels`."""
Reader = Callable[[Batch], list[Document]]
Flat = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Offsets at which documents start and the last one ends, then the `input_ids` and `labels` of all of them."""


def _content_column(columns: Sequence[str], text_field: str, key: str) -> str:
    """The column that holds the documents; tokens take precedence over text, text over conversations."""
    for name in ("input_ids", text_field, "messages", "conversations"):
        if name in columns:
            return name
    if {"prompt", "completion"} <= set(columns):
        return "prompt"
    accepted = f"input_ids, {text_field}, messages, conversations, or prompt and completion"
    raise UserError(key, f"has the columns {', '.join(columns)}; one of these is needed: {accepted}")


def _reader(column: str, tokenizer: PreTrainedTokenizerBase, row_format: RowFormat, key: str) -> Reader:
    completion_only = row_format.completion_only_loss is not False
    if row_format.assistant_only_loss:
        return _assistant_reader(column, tokenizer, completion_only, key)

    def read_text(batch: Batch) -> list[Document]:
        _require_text(batch[column], key, f"column {column!r}")
        texts = [text for text in batch[column] if text]
        return [(input_ids, list(input_ids)) for input_ids in _encode(texts, tokenizer, key, complete=True)]

    def read_conversations(batch: Batch) -> list[Document]:
        texts = [_render(row, tokenizer, key)["text"] for row in _rows_of(batch) if row[column]]
        return [(input_ids, list(input_ids)) for input_ids in _encode(texts, tokenizer, key, complete=False)]

    def read_completions(batch: Batch) -> list[Document]:
        rows = [row for row in _rows_of(batch) if row["prompt"] and row["completion"]]
        return _read_completions(rows, tokenizer, completion_only, key)

    if column in ("messages", "conversations"):
        return read_conversations
    return read_completions if column == "prompt" else read_text


def _rows_of(batch: Batch) -> list[dict[str, Any]]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _read_documents(reader: Reader, batch: Batch) -> Flat:
    documents = reader(batch)
    offsets = running_sums(np.array([len(input_ids) for input_ids, _ in documents], dtype=np.int64))
    input_ids = np.fromiter(chain.from_iterable(input_ids for input_ids, _ in documents), np.int32)
    labels = np.fromiter(chain.from_iterable(labels for _, labels in documents), np.int32)
    return offsets, input_ids, labels


def _read_tokens(table: pa.Table, vocabulary: int, key: str) -> Flat:
    """Tokens as they are, without padding; where a row has no labels, its tokens are the labels."""
    lengths, values = list_entries(table["input_ids"])
    input_ids = labels = _checked_tokens(values, "input_ids", 0, vocabulary, key)
    offsets = running_sums(lengths)
    if "labels" in table.column_names:
        counts, values = list_entries(table["labels"])
        given = _checked_tokens(values, "labels", IGNORED_LABEL, vocabulary, key)
        wrong = np.flatnonzero((counts != 0) & (counts != lengths))
        if len(wrong):
            found = f"{lengths[wrong[0]]} input_ids and {counts[wrong[0]]} labels"
            raise UserError(key, f"a row has {found}; both must have the same length")
        labels = input_ids.copy()
        labels[np.repeat(counts != 0, lengths)] = given
    if "attention_mask" in table.column_names:
        counts, values = list_entries(table["attention_mask"])
        masked = table["attention_mask"].is_valid().to_numpy()
        wrong = np.flatnonzero(masked & (counts != lengths))
        if len(wrong):
            found = f"{lengths[wrong[0]]} input_ids and an attention_mask of {counts[wrong[0]]}"
            raise UserError(key, f"a row has {found}")
        seen = np.ones(len(input_ids), dtype=bool)
        seen[np.repeat(masked, lengths)] = values.cast(pa.bool_()).fill_null(False).to_numpy(zero_copy_only=False)
        input_ids, labels = input_ids[seen], labels[seen]
        offsets = running_sums(seen)[offsets]
    return offsets, input_ids, labels


def list_entries(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Lengths of all lists of a column, 0 for a missing one, and the entries of all lists."""
    lists = pa.concat_arrays(column.chunks)
    lists = lists.cast(pa.list_(pa.int32())) if pa.types.is_null(lists.type) else lists
    return pc.list_value_length(lists).fill_null(0).to_numpy(), lists.flatten()


def running_sums(numbers: np.ndarray) -> np.ndarray:
    """Sums of the first 0, 1, 2 ... and all numbers; of lengths, the offsets where lists start and the last ends."""
    return np.concatenate([[0], np.cumsum(numbers)])


def _checked_tokens(values: pa.Array, name: str, lowest: int, vocabulary: int, key: str) -> np.ndarray:
    tokens = values.to_numpy(zero_copy_only=False)
    strange = tokens[~((tokens >= lowest) & (tokens < vocabulary))]
    if len(strange):
        raise UserError(
            key,
            f"{name} holds token {strange[0]}, but the tokenizer has {vocabulary} tokens; "
            "the rows were made with another tokenizer",
        )
    return values.cast(pa.int32()).to_numpy()


def _read_completions(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, completion_only: bool, key: str
) -> list[Document]:
    """Prompts and completions. A prompt ends where its tokens, encoded alone, differ from those of the whole."""
    if not rows:
        return []
    both = [row[name] for row in rows for name in ("prompt", "completion")]
    conversational = all(isinstance(each, list) for each in both)
    if conversational:
        rows = [_render(row, tokenizer, key) for row in rows]
    else:
        _require_text(both, key, "prompt and completion")
    wholes = _encode([row["prompt"] + row["completion"] for row in rows], tokenizer, key, complete=not conversational)
    if not completion_only:
        return [(whole, list(whole)) for whole in wholes]
    prompts = [row["prompt"] for row in rows]
    prompts = _encode(prompts, tokenizer, key, complete=False) if conversational else encode_texts(tokenizer, prompts)
    documents = []
    for prompt, whole in zip(prompts, wholes, strict=True):
        start = common_prefix_length(prompt, whole)
        documents.append((whole, [IGNORED_LABEL] * start + whole[start:]))
    return documents


def _assistant_reader(column: str, tokenizer: PreTrainedTokenizerBase, completion_only: bool, key: str) -> Reader:
    """Only the assistant's tokens count; of prompt and completion only those in the completion.

    A conversation without any is an empty document.
    """
    require_chat_template(tokenizer, key)
    template = training_template(tokenizer)
    encode = assistant_encoder(tokenizer, template)

    def read(row: dict[str, Any]) -> Document:
        with template_errors(key):
            row, tools = conversation(row)
            options = {"tools": tools or None, **row.get("chat_template_kwargs", {})}
            messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
            input_ids, mask = encode(messages, options)
            start = 0
            if "prompt" in row and completion_only:
                prompt = apply_chat_template(row, tokenizer, tools, chat_template=template)["prompt"]
                start = common_prefix_length(tokenizer(prompt, add_special_tokens=False).input_ids, input_ids)
        counted = [index >= start and each for index, each in enumerate(mask)]
        if not any(counted):
            return [], []
        return input_ids, [token if each else IGNORED_LABEL for token, each in zip(input_ids, counted, strict=True)]

    def complete(row: dict[str, Any]) -> bool:
        return bool(row[column]) and (column != "prompt" or bool(row["completion"]))

    return lambda batch: [read(row) for row in _rows_of(batch) if complete(row)]


def _render(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, key: str) -> dict[str, str]:
    """A conversation as text: `text`, or `prompt` and `completion`."""
    require_chat_template(tokenizer, key)
    with template_errors(key):
        row, tools = conversation(row)
        rendered: dict[str, str] = apply_chat_template(row, tokenizer, tools)
    return rendered


def require_chat_template(tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    if tokenizer.chat_template is None:
        raise UserError(
            key,
            "holds conversations, but the tokenizer has no chat template; use a model that has one, or texts",
        )


def template_errors(key: str) -> AbstractContextManager[None]:
    """Within it, whatever a chat template or TRL's functions raise is a `UserError`."""
    return reading(key, "a conversation does not fit the tokenizer's chat template: ", str)


def conversation(row: dict[str, Any]) -> tuple[dict[str, Any], list[Any] | None]:
    """A row as chat templates and TRL's functions take it, and its tools."""
    row = _without_empty_fields(row)
    tools = row.pop("tools", None)
    tools = json.loads(tools) if isinstance(tools, str) else tools
    row = maybe_convert_to_chatml(row)
    for name in {"messages", "prompt", "completion"} & set(row):
        row[name] = [_usual_message(message) for message in row[name]]
    return row, tools


def _without_empty_fields(value: Any) -> Any:
    """Without the fields that a table adds, empty, to tool calls, tools and messages because those of others have them.

    A table does not say which fields were empty in the first place.
    """
    if isinstance(value, dict):
        return {name: _without_empty_fields(each) for name, each in value.items() if each is not None}
    return [_without_empty_fields(each) for each in value] if isinstance(value, list) else value


def _usual_message(message: dict[str, Any]) -> dict[str, Any]:
    """With the usual name of its role, and its content as one text.

    Content may be in parts (`{"type": "text", "text": ...}`), which a template of texts would print as code.
    """
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise ValueError(f"its content has a part of type {kind!r}; a student of text reads parts of type text")
        content = "".join(part["text"] for part in content)
    given = {} if content is None else {"content": content}
    return {**message, **given, "role": _ROLES.get(message["role"], message["role"])}


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, key: str, *, complete: bool) -> list[list[int]]:
    """Token ids. A complete document gets the tokenizer's special tokens and ends with one EOS; others are as given."""
    if not texts:
        return []
    if not complete:
        rendered: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        return rendered
    eos_token_id = _eos_token_id(tokenizer, key)
    encoded = encode_texts(tokenizer, texts, closed=True)
    return [ids if ids[-1:] == [eos_token_id] else [*ids, eos_token_id] for ids in encoded]


def _eos_token_id(tokenizer: PreTrainedTokenizerBase, key: str) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError(key, "the tokenizer has no EOS token, which ends each document; set its eos_token")
    return int(tokenizer.eos_token_id)


def _require_text(values: list[Any], key: str, what: str) -> None:
    for value in values:
        if value is not None and not isinstance(value, str):
            raise UserError(key, f"{what} must hold text, got {type(value).__name__}")
