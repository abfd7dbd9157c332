"""Documents in which passages return, from which a model learns to copy from its context.

In ordinary text the next token seldom depends on what stood a thousand tokens earlier. Here 16 to 64 tokens return word
for word, from anywhere in the last 2,000, and a model predicts them only if it has kept them.
"""

from collections.abc import Callable

import numpy as np
from transformers import PreTrainedTokenizerBase

from distillkit.data.synthetic.rewriting import Tokens, digit_tokens, encode, random_between

PASSAGE = (16, 64)
"""Fewest and most tokens of a passage that returns."""
GAP = (16, 96)
"""Tokens of the text between two of them."""
REACH = 2000
"""Tokens before it from which a passage is taken."""
KEY, DIGITS = (2, 4), (5, 8)
"""Tokens of the two parts of an entry."""

Entry = Callable[[Tokens, Tokens], Tokens]
"""(tokens of the text, digits from 0 to 9) → a line that gives these tokens that number."""


class RepeatedPassages:
    """A rewriter (see `rewriting`) that lets passages return.

    entry: if given, lines that give tokens of the text a random number are inserted too; half of them are new, the
    others repeat an earlier one.
    """

    def __init__(self, entry: Entry | None = None) -> None:
        self.entry = entry

    def __call__(self, text: Tokens, generator: np.random.Generator, limit: int | None) -> tuple[Tokens, int]:
        document, recent = [np.empty(0, text.dtype)], np.empty(0, text.dtype)
        entries: list[Tokens] = []
        used, length = 0, 0
        while used < len(text) and (limit is None or length < limit):
            parts = [text[used : used + random_between(generator, GAP)]]
            used += len(parts[0])
            if self.entry is not None and used < len(text) and generator.random() < 0.5:
                if not entries or generator.random() >= 0.5:
                    entries.append(self._new_entry(self.entry, parts[0], generator))
                    parts.append(entries[-1])
                else:
                    parts.append(entries[generator.integers(len(entries))])
            recent = np.concatenate([recent, *parts])[-REACH:]
            again = random_between(generator, PASSAGE)
            if used < len(text) and again < len(recent):
                start = generator.integers(len(recent) - again)
                parts.append(recent[start : start + again])
                recent = np.concatenate([recent, parts[-1]])
            document += parts
            length += sum(map(len, parts))
        return np.concatenate(document)[:limit], used

    @staticmethod
    def _new_entry(entry: Entry, text: Tokens, generator: np.random.Generator) -> Tokens:
        start = generator.integers(max(len(text) - KEY[1], 1))
        key = text[start : start + random_between(generator, KEY)]
        return entry(key, generator.integers(10, size=random_between(generator, DIGITS))).astype(text.dtype)


def numbered_entries(tokenizer: PreTrainedTokenizerBase) -> Entry:
    """Lines such as `Entry some words: 12345.` in the tokens of a tokenizer."""
    before, middle, after = (encode(tokenizer, part) for part in ("\nEntry", ": ", ".\n"))
    digits = digit_tokens(tokenizer)
    return lambda key, number: np.concatenate([before, key, middle, digits[number], after])
