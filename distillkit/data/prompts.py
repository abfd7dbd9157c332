"""Prompts as token ids: conversations up to the last answer, a column of prompts, or the beginnings of texts."""

from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import apply_chat_template

from distillkit.config.data import DatasetSource
from distillkit.config.errors import UserError
from distillkit.data.rows import conversation, require_chat_template, template_errors
from distillkit.data.sources import load_source
from distillkit.models.special_tokens import encode_texts

CHARACTERS = 16
"""Of a text, per token that is wanted, more than tokens have: the rest of long texts need not be read."""


def read_prompts(
    source: DatasetSource,
    tokenizer: PreTrainedTokenizerBase,
    longest: int | None,
    *,
    text_field: str,
    prompt_tokens: int,
    seed: int,
    key: str,
) -> list[list[int]]:
    """All prompts, of at most `longest` tokens, in an order that the seed decides.

    Args:
        text_field: column of texts, whose first `prompt_tokens` tokens are prompts.
        key: of the source in the YAML, beside the keys of the other arguments.

    Raises `UserError` where the source cannot be read, and where it has no such prompt.
    """
    beside = key.removesuffix("prompts")
    rows = load_source(source, key).shuffle(seed=seed)
    accepted = (text_field, "messages", "conversations", "prompt")
    column = next((name for name in accepted if name in rows.column_names), None)
    if column is None:
        found = ", ".join(rows.column_names)
        raise UserError(key, f"has the columns {found}; one of these is needed: {', '.join(accepted)}")
    if column == text_field:
        texts = _texts(rows, column, tokenizer, key, longest=prompt_tokens * CHARACTERS)
        prompts = [ids[:prompt_tokens] for ids in texts if len(ids) >= prompt_tokens]
        problem = f"no text has {prompt_tokens:,} tokens ({beside}prompt_tokens)"
    else:
        prompts, problem = list(_whole_prompts(rows, column, tokenizer, key)), "no row is a prompt"
    fitting = [ids for ids in prompts if len(ids) > 0 and (longest is None or len(ids) <= longest)]
    if prompts and not fitting and longest is not None:
        problem = f"no prompt has at most {longest:,} tokens, which leave room for {beside}max_new_tokens in a row"
    if not fitting:
        raise UserError(key, problem)
    return fitting


def _texts(
    rows: Dataset, column: str, tokenizer: PreTrainedTokenizerBase, key: str, longest: int | None = None
) -> Iterator[list[int]]:
    """longest: of a text, the characters that are read."""
    for batch in rows.select_columns(column).iter(batch_size=256):
        texts = [text for text in batch[column] if text]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(key, f"column {column!r} holds something else than text")
        yield from encode_texts(tokenizer, [text[:longest] for text in texts])


def _whole_prompts(rows: Dataset, column: str, tokenizer: PreTrainedTokenizerBase, key: str) -> Iterator[list[int]]:
    if isinstance(next((each for each in rows[column] if each), None), list):
        require_chat_template(tokenizer, key)
        texts = [_asked(row, column, tokenizer, key) for row in rows if row[column]]
        yield from tokenizer([text for text in texts if text], add_special_tokens=False, verbose=False).input_ids
    else:
        yield from _texts(rows, column, tokenizer, key)


def _asked(row: dict[str, Any], column: str, tokenizer: PreTrainedTokenizerBase, key: str) -> str:
    """A conversation without the answer at its end, and the header that asks the assistant for one."""
    given = {name: row[name] for name in (column, "tools", "chat_template_kwargs") if name in row}
    with template_errors(key):
        read, tools = conversation(given)
        messages = read.pop("messages" if column == "conversations" else column)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            return ""
        asked: str = apply_chat_template({**read, "prompt": messages}, tokenizer, tools)["prompt"]
    return asked
