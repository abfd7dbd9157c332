"""Text in which passages return, from which a model learns to remember.

Ordinary text seldom asks for what was said a thousand tokens ago. Here 16 to 64 tokens come again as they stand, from
anywhere within the last 2,000; there a model can only be right if it has kept them. Entries are lines that give some
tokens of the text a number of random digits; as many come again as are new.
"""

from collections.abc import Callable

import numpy as np
from rewriting import Tokens, Writer, between, digits_of, encoded
from transformers import PreTrainedTokenizerBase

PASSAGE = (16, 64)
BETWEEN = (16, 96)
"""Tokens of the text from one passage that returns to the next."""
REACH = 2000
KEY, DIGITS = (2, 4), (5, 8)
"""Tokens of an entry's two parts."""

Entry = Callable[[Tokens, Tokens], Tokens]
"""A line that gives the first its second, which are tokens of the text and numbers from 0 to 9."""


def passages_that_return(entry: Entry | None = None) -> Writer:
    """Documents in which passages return, and with `entry` entries too."""
    return lambda text, generator, most: written(text, generator, entry, most)


def written(text: Tokens, generator: np.random.Generator, entry: Entry | None, most: int | None) -> tuple[Tokens, int]:
    """The text with what returns, at most so many tokens of it, and how many of its own tokens that took."""
    document = np.empty(0, text.dtype)
    entries: list[Tokens] = []
    used = 0
    while used < len(text) and (most is None or len(document) < most):
        parts = [text[used : used + between(generator, BETWEEN)]]
        used += len(parts[0])
        if entry is not None and used < len(text) and generator.random() < 0.5:
            if entries and generator.random() < 0.5:
                parts.append(entries[generator.integers(len(entries))])
            else:
                begin = generator.integers(max(len(parts[0]) - KEY[1], 1))
                key = parts[0][begin : begin + between(generator, KEY)]
                entries.append(entry(key, generator.integers(10, size=between(generator, DIGITS))).astype(text.dtype))
                parts.append(entries[-1])
        near = np.concatenate([document[-REACH:], *parts])[-REACH:]
        length = between(generator, PASSAGE)
        if used < len(text) and length < len(near):
            begin = generator.integers(len(near) - length)
            parts.append(near[begin : begin + length])
        document = np.concatenate([document, *parts])
    return document[:most], used


def entries_of(tokenizer: PreTrainedTokenizerBase) -> Entry:
    """Entries in the tokens of a tokenizer."""
    before, middle, after = (encoded(tokenizer, part) for part in ("\nEntry", ": ", ".\n"))
    digits = digits_of(tokenizer)
    return lambda key, number: np.concatenate([before, key, middle, digits[number], after])
