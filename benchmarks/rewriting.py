"""Some documents of a text written anew, so that they ask for what was said long before."""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from distillkit.data.rows import list_entries, running_sums

Tokens = np.ndarray
Writer = Callable[[Tokens, np.random.Generator, int | None], tuple[Tokens, int]]
"""Of a text it makes a document of at most so many tokens, and says how many of the text's that took; without a number,
one document of the whole text."""


def rewritten(
    documents: pa.Table, writers: Sequence[tuple[float, Writer]], seed: int, together: int | None = None
) -> pa.Table:
    """The documents in column `input_ids`; each writer makes its share of them anew. Those come last.

    together: they are joined first, without the tokens that end them, and made into documents of so many tokens.
    """
    generator = np.random.default_rng(seed)
    lengths, ids = list_entries(documents["input_ids"])
    texts = np.split(ids.to_numpy(), np.cumsum(lengths)[:-1])
    ends = np.cumsum([share for share, _ in writers])
    whose = np.searchsorted(ends, generator.random(len(texts)), side="right")
    written = [text for text, writer in zip(texts, whose, strict=True) if writer == len(writers)]
    for number, (_, write) in enumerate(writers):
        own = [text for text, writer in zip(texts, whose, strict=True) if writer == number]
        if together is None or not own:
            written += [write(text, generator, None)[0] for text in own]
            continue
        joined = np.concatenate([text[:-1] for text in own])
        start = 0
        while start < len(joined):
            document, used = write(joined[start:], generator, together)
            written.append(document)
            start += used
    return documents_of(np.array([len(text) for text in written]), pa.array(np.concatenate(written), ids.type))


def documents_of(lengths: np.ndarray, ids: pa.Array) -> pa.Table:
    """Documents in column `input_ids`, of so many tokens each."""
    return pa.table({"input_ids": pa.LargeListArray.from_arrays(pa.array(running_sums(lengths)), ids)})


def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
    return np.array(tokenizer.encode(text, add_special_tokens=False))


def digits_of(tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """The token of each digit within a number: the last, where a tokenizer begins a text with one of its own."""
    return np.concatenate([encoded(tokenizer, str(digit))[-1:] for digit in range(10)])


def between(generator: np.random.Generator, ends: tuple[int, int]) -> int:
    return int(generator.integers(*ends, endpoint=True))
