"""Text in which facts are told and asked for later, from which a model learns to keep what matters.

A fact gives words of the text a number. Between facts and questions stands the text, or a stretch of it over and over,
as a needle's haystack is made of essays or of a few sentences; of that text, no more than the stretch is used. Most
questions stand in the last quarter of a document, so that facts are asked for long after.
"""

import re
from collections.abc import Callable

import numpy as np
from rewriting import Tokens, Writer, between, digits_of, encoded
from transformers import PreTrainedTokenizerBase

FACT_EVERY = 170
"""Tokens, at the most facts that a document has. Each is told within the first three quarters, and asked for twice."""
WORDS, DIGITS = (1, 3), (4, 8)
STRETCH = (16, 96)
"""Tokens that stand over and over in half of the documents."""

THINGS = ("number", "code", "password", "address", "price", "record", "year", "weight")
TOLD_AND_ASKED = (
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
Fact = dict[str, Tokens]
"""What stands in a sentence's places: `thing`, `words` and `number`, each with the space before it."""


def facts_asked_for(tokenizer: PreTrainedTokenizerBase) -> Writer:
    """Documents with facts and questions, of exactly so many tokens while the text lasts: without a number, of as many
    as the text has. One too short for a fact stays as it is.
    """

    def filled(wording: str) -> Callable[[Fact], Tokens]:
        parts = [part for part in re.split(r"(\{\w+\})", wording) if part]
        fixed = {part: encoded(tokenizer, part) for part in parts if not part.startswith("{")}
        return lambda fact: np.concatenate([fixed[part] if part in fixed else fact[part[1:-1]] for part in parts])

    things = [encoded(tokenizer, f" {thing}") for thing in THINGS]
    told, asked = ([filled(wording) for wording in wordings] for wordings in zip(*TOLD_AND_ASKED, strict=True))
    space, digits = encoded(tokenizer, " "), digits_of(tokenizer)
    vocabulary = tokenizer.get_vocab()
    is_word = np.zeros(max(vocabulary.values()) + 1, bool)
    for token, place in vocabulary.items():
        is_word[place] = len(token) > 5 and token[0] in "Ġ▁" and token[1:].isalpha()

    def fact_of(text: Tokens, generator: np.random.Generator) -> Fact:
        words = text[is_word[text]]
        number = digits[generator.integers(10, size=between(generator, DIGITS))]
        return {
            "thing": things[generator.integers(len(things))],
            "words": generator.choice(words, between(generator, WORDS)) if len(words) else things[0],
            "number": np.concatenate([space, number]),
        }

    def write(text: Tokens, generator: np.random.Generator, most: int | None) -> tuple[Tokens, int]:
        if most is None:  # its last token ends it
            return np.append(write(text[:-1], generator, len(text) - 1)[0], text[-1:]), len(text)
        if most < FACT_EVERY:
            return text[:most], min(most, len(text))
        sentences: list[tuple[float, Tokens]] = []
        for _ in range(between(generator, (1, most // FACT_EVERY))):
            fact = fact_of(text[:most], generator)
            place = 0.75 * generator.random()
            wording = generator.integers(len(told))
            sentences.append((place, told[wording](fact)))
            for earliest in (place, 0.75):
                again = generator.uniform(earliest, 1)
                sentences.append((again, asked[wording](fact)))
        sentences.sort(key=lambda each: each[0])
        room = most - sum(len(each) for _, each in sentences)
        used = min(room, len(text))
        between_them = text[:used]
        if generator.random() < 0.5:
            between_them = np.resize(between_them[: between(generator, STRETCH)], room)
        cuts = [int(place * len(between_them)) for place, _ in sentences]
        parts = np.split(between_them, cuts)
        document = [
            part for each, (_, sentence) in zip(parts[:-1], sentences, strict=True) for part in (each, sentence)
        ]
        return np.concatenate([*document, parts[-1]]).astype(text.dtype), used

    return write
