"""Documents that state facts and ask for them later, from which a model learns to keep what will be asked.

A fact gives some words of the text a number. It is stated once, in the first three quarters of the document, and asked
for twice after that, mostly in the last quarter. In half of the documents the text between is a short stretch that
repeats, as the haystacks of needles tests are made of a few sentences; in the other half it is running text.
"""

import re
from collections.abc import Callable

import numpy as np
from transformers import PreTrainedTokenizerBase

from distillkit.data.synthetic.rewriting import Tokens, digit_tokens, encode, random_between

TOKENS_PER_FACT = 170
"""A document has at most one fact for so many of its tokens, and none if it is shorter."""
WORDS, DIGITS = (1, 3), (4, 8)
"""Fewest and most words and digits of a fact."""
STRETCH = (16, 96)
"""Tokens of a stretch that repeats."""

THINGS = ("number", "code", "password", "address", "price", "record", "year", "weight")
STATEMENTS_AND_QUESTIONS = (
    (
        " The{thing} of{words} is:{number}.",
        " What is the{thing} of{words}? The{thing} of{words} given in the text is{number}.",
    ),
    (" Remember that the{thing} for{words} is{number}.", " As was said, the{thing} for{words} is{number}."),
    (
        " One{thing} for{words} was found:{number}.",
        " Which{thing} for{words} was found? The{thing} for{words} that was found is{number}.",
    ),
    ("{words} has the{thing}{number}.", " Which{thing} does{words} have?{words} has the{thing}{number}."),
    (" Entry{words}:{number}.", " Entry{words}:{number}."),
    (
        " One secret{thing} is for{words}:{number}.",
        " The secret{thing} for{words}, which was told before, is{number}.",
    ),
    (" Note:{words},{thing}{number}.", " Asked for a{thing}, as noted:{words},{thing}{number}."),
)
"""Wordings of a fact, and of the question and answer about it."""

Fact = dict[str, Tokens]
"""`thing`, `words` and `number`, each with the space before it."""


class QuestionsAboutFacts:
    """A rewriter (see `rewriting`) that inserts facts, and questions with their answers, between parts of the text.

    A document has exactly `limit` tokens while the text lasts; without a limit, as many as the text and the same last
    token. A text that is too short for a fact stays as it is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        def compiled(wording: str) -> Callable[[Fact], Tokens]:
            parts = [part for part in re.split(r"(\{\w+\})", wording) if part]
            fixed = {part: encode(tokenizer, part) for part in parts if not part.startswith("{")}
            return lambda fact: np.concatenate([fixed[part] if part in fixed else fact[part[1:-1]] for part in parts])

        self._wordings = [tuple(map(compiled, pair)) for pair in STATEMENTS_AND_QUESTIONS]
        self._things = [encode(tokenizer, f" {thing}") for thing in THINGS]
        self._space, self._digits = encode(tokenizer, " "), digit_tokens(tokenizer)
        vocabulary = tokenizer.get_vocab()
        self._is_word = np.zeros(max(vocabulary.values()) + 1, bool)
        for token, number in vocabulary.items():
            self._is_word[number] = len(token) > 5 and token[0] in "Ġ▁" and token[1:].isalpha()

    def __call__(self, text: Tokens, generator: np.random.Generator, limit: int | None) -> tuple[Tokens, int]:
        if limit is None:  # the last token ends the document
            return np.append(self(text[:-1], generator, len(text) - 1)[0], text[-1:]), len(text)
        if limit < TOKENS_PER_FACT:
            return text[:limit], min(limit, len(text))
        sentences = self._sentences(text[:limit], generator, random_between(generator, (1, limit // TOKENS_PER_FACT)))
        room = limit - sum(len(sentence) for _, sentence in sentences)
        used = min(room, len(text))
        filler = text[:used]
        if generator.random() < 0.5:
            filler = np.resize(filler[: random_between(generator, STRETCH)], room)
        parts = np.split(filler, [int(place * len(filler)) for place, _ in sentences])
        document = [parts[0]]
        for (_, sentence), part in zip(sentences, parts[1:], strict=True):
            document += [sentence, part]
        return np.concatenate(document).astype(text.dtype), used

    def _sentences(self, text: Tokens, generator: np.random.Generator, facts: int) -> list[tuple[float, Tokens]]:
        """Statements and questions of so many facts, each with its place in the document from 0 to 1, in order."""
        sentences = []
        words = text[self._is_word[text]]
        for _ in range(facts):
            fact = self._fact(words, generator)
            place = 0.75 * generator.random()
            statement, question = self._wordings[generator.integers(len(self._wordings))]
            sentences.append((place, statement(fact)))
            for earliest in (place, 0.75):
                sentences.append((generator.uniform(earliest, 1), question(fact)))
        return sorted(sentences, key=lambda each: each[0])

    def _fact(self, words: Tokens, generator: np.random.Generator) -> Fact:
        number = self._digits[generator.integers(10, size=random_between(generator, DIGITS))]
        return {
            "thing": self._things[generator.integers(len(self._things))],
            "words": generator.choice(words, random_between(generator, WORDS)) if len(words) else self._things[0],
            "number": np.concatenate([self._space, number]),
        }
