"""Some documents of a tokenised text are rewritten: a share of them by each of several rewriters."""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from distillkit.data.rows import list_entries, running_sums

Tokens = np.ndarray
"""Token ids `[tokens]`."""
Rewriter = Callable[[Tokens, np.random.Generator, int | None], tuple[Tokens, int]]
"""(text, generator, limit) → a document of at most `limit` tokens, and how many tokens of the text it took.

Without a limit: one document of the whole text.
"""


def rewrite_documents(
    documents: pa.Table, rewriters: Sequence[tuple[float, Rewriter]], seed: int, document_length: int | None = None
) -> pa.Table:
    """A table with column `input_ids`: the documents that stay as they are, then those of each rewriter.

    rewriters: each with its share of the documents, which are chosen at random.
    document_length: tokens of a rewritten document. A rewriter's documents are joined without their last tokens, which
    end them, and cut again. Without a length each is rewritten by itself.
    """
    generator = np.random.default_rng(seed)
    lengths, ids = list_entries(documents["input_ids"])
    texts = np.split(ids.to_numpy(), np.cumsum(lengths)[:-1])
    ends = np.cumsum([share for share, _ in rewriters])
    chosen = np.searchsorted(ends, generator.random(len(texts)), side="right")
    written = [text for text, number in zip(texts, chosen, strict=True) if number == len(rewriters)]
    for number, (_, rewrite) in enumerate(rewriters):
        own = [text for text, each in zip(texts, chosen, strict=True) if each == number]
        if document_length is None or not own:
            written += [rewrite(text, generator, None)[0] for text in own]
            continue
        joined = np.concatenate([text[:-1] for text in own])
        start = 0
        while start < len(joined):
            document, used = rewrite(joined[start:], generator, document_length)
            written.append(document)
            start += used
    return table_of_documents(np.array([len(text) for text in written]), pa.array(np.concatenate(written), ids.type))


def table_of_documents(lengths: np.ndarray, ids: pa.Array) -> pa.Table:
    """Documents of these lengths, whose tokens are given one after the other, in column `input_ids`."""
    return pa.table({"input_ids": pa.LargeListArray.from_arrays(pa.array(running_sums(lengths)), ids)})


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
    """The tokens of a piece of text, without special tokens."""
    return np.array(tokenizer.encode(text, add_special_tokens=False))


def digit_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """The tokens of the digits 0 to 9 inside a number.

    The last token of each counts, for some tokenizers begin every text with a token of their own.
    """
    return np.concatenate([encode(tokenizer, str(digit))[-1:] for digit in range(10)])


def random_between(generator: np.random.Generator, bounds: tuple[int, int]) -> int:
    """A random whole number within the bounds, both included."""
    return int(generator.integers(*bounds, endpoint=True))
