"""Needles in a haystack as RULER has them (Hsieh et al. 2024, arXiv 2404.06654): the prompts of eight tasks and one.

The ninth, `niah_multikey_similar`, is `niah_multikey_1` with eight keys of which seven share a word with the one asked
for: who remembers a number, but not whose it is, gives another's.

A needle is a sentence that gives the value of a key. The prompt ends with a question for the values of one or several
keys, and with the beginning of the answer, so that a base model continues with them. Sentences and questions are worded
as in RULER, because the wording is the benchmark. Differences:

- The nominal length is the length of the whole prompt, which is never longer and, from 256 tokens on, at most 2 %
  shorter. RULER takes the 128 tokens of the answer off it.
- The queried needle is at a given depth, the share of the context's characters before it; all others are at random
  places. RULER draws the places of all.
- The essays may be any text. It starts at a random sentence, and is repeated where it ends.
- A haystack made of needles is filled with noise where another needle would be too long.

The same seed gives the same prompts. No key and no value is in a prompt twice.
"""

import random
import re
import uuid
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, cycle, islice
from typing import Literal

from transformers import PreTrainedTokenizerBase
from wonderwords import RandomWord

from distillkit.config.errors import UserError
from distillkit.models.special_tokens import encode_texts

NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
ONE_ANSWER = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {keys} mentioned in the provided text? "
    "The special magic {kind} for {keys} mentioned in the provided text is"
)
SEVERAL_ANSWERS = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind}s afterwards.\n{context}\n"
    "What are all the special magic {kind}s for {keys} mentioned in the provided text? "
    "The special magic {kind}s for {keys} mentioned in the provided text are"
)
LONGEST_SENTENCE = 40
"""Words. Longer text without a full stop (a table, a listing) is cut, so that needles can be at every depth."""


@dataclass(frozen=True)
class TaskDefinition:
    """What the haystack is made of, the kinds of keys and values, and the number of needles."""

    haystack: Literal["noise", "essay", "needles"]
    key: Literal["word", "uuid"] = "word"
    value: Literal["number", "uuid"] = "number"
    keys: int = 1
    values: int = 1
    """Values of each key."""
    queries: int = 1
    """Number of keys in the question."""
    similar: bool = False
    """Whether the other keys have a word in common with the one in the question."""


TASKS = {
    "niah_single_1": TaskDefinition("noise"),
    "niah_single_2": TaskDefinition("essay"),
    "niah_single_3": TaskDefinition("essay", value="uuid"),
    "niah_multikey_1": TaskDefinition("essay", keys=4),
    "niah_multikey_2": TaskDefinition("needles"),
    "niah_multikey_3": TaskDefinition("needles", key="uuid", value="uuid"),
    "niah_multivalue": TaskDefinition("essay", values=4),
    "niah_multiquery": TaskDefinition("essay", keys=4, queries=4),
    "niah_multikey_similar": TaskDefinition("essay", keys=8, similar=True),
}


@dataclass(frozen=True)
class Prompt:
    """A prompt, its tokens, the needle at the given depth, and the values that an answer should contain."""

    text: str
    token_ids: list[int]
    needle: str
    wanted: tuple[str, ...]
    others: tuple[str, ...] = ()
    """Values of the similar keys."""


class Essay:
    """Any text as a haystack: its sentences, without the white space between them."""

    def __init__(self, text: str) -> None:
        self.text = " ".join(text.split())
        sentences = re.split(r"(?<=[.!?]) ", self.text)
        self.sentences = [part for sentence in sentences for part in _cut_long(sentence.split())]

    def lines(self, start: int, words: int) -> list[str]:
        """`words` words from sentence `start` on, from the beginning again after the end of the text."""
        lines = []
        for sentence in islice(cycle(self.sentences), start, None):
            if words <= 0:
                break
            lines.append(" ".join(sentence[:words]))
            words -= len(sentence)
        return lines


def build_prompt(
    task: TaskDefinition,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    depth: float,
    seed: str,
    essay: Essay | None = None,
) -> Prompt:
    """The prompt of at most `length` tokens with its needle at `depth` (0: before the haystack, 1: after it).

    Special tokens are those that the tokenizer puts before a text by itself; no chat template is applied.

    Raises:
        UserError: `length` is too short for needles and question, or the task needs an essay and there is none.
    """
    generator = random.Random(seed)
    if task.haystack == "essay" and (essay is None or not essay.sentences):
        raise UserError("needles.haystack", "is missing: this task hides its needles in text; name a file or dataset")
    names = _Names(task, generator, essay.text if essay is not None and task.haystack == "essay" else "")
    if task.similar:
        asked = names.key()
        queried, keys = [asked], [asked, *(names.key_like(asked, part % 2) for part in range(task.keys - 1))]
        needles = {key: [names.value()] for key in keys}
    else:
        needles = {names.key(): [names.value() for _ in range(task.values)] for _ in range(task.keys)}
        queried = generator.sample(list(needles), task.queries)
    sentences = [names.needle(key, value) for key, values in needles.items() for value in values]
    needle = names.needle(queried[0], needles[queried[0]][0])
    sentences.remove(needle)
    places = [generator.random() for _ in sentences]
    haystack = _haystack(task, generator, names, essay)
    separator = " " if task.haystack == "essay" else "\n"
    wanted = tuple(value for key in queried for value in needles[key])
    template = ONE_ANSWER if len(wanted) == 1 else SEVERAL_ANSWERS

    def compose(size: int, filling: int) -> str:
        lines = haystack(size) + _noise(filling)
        for place, sentence in sorted(zip(places, sentences, strict=True), reverse=True):
            lines.insert(round(place * len(lines)), sentence)
        lines.insert(_line_at(depth, lines), needle)
        return template.format(kind=task.value, context=separator.join(lines), keys=_enumerated(queried))

    text, token_ids = _longest_that_fits(compose, tokenizer, length, fill=task.haystack == "needles")
    others = tuple(value for key in needles if key not in queried for value in needles[key]) if task.similar else ()
    return Prompt(text, token_ids, needle, wanted, others)


class _Names:
    """Draws keys and values that are new and do not occur in the essay."""

    def __init__(self, task: TaskDefinition, generator: random.Random, essay: str) -> None:
        self.task, self.generator, self.essay = task, generator, essay
        self.used: set[str] = set()

    def key(self) -> str:
        return self._new(self._word if self.task.key == "word" else self._uuid)

    def key_like(self, key: str, part: int) -> str:
        """A key that has one of both words in common with another, in its place."""

        def draw() -> str:
            words = self._word().split("-")
            words[part] = key.split("-")[part]
            return "-".join(words)

        return self._new(draw)

    def value(self) -> str:
        return self._new(self._number if self.task.value == "number" else self._uuid)

    def needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.task.value, key=key, value=value)

    def _new(self, draw: Callable[[], str]) -> str:
        while (name := draw()) in self.used or name in self.essay:
            pass
        self.used.add(name)
        return name

    def _word(self) -> str:
        return "-".join(self.generator.choice(words) for words in _adjectives_and_nouns())

    def _number(self) -> str:
        return str(self.generator.randrange(10**6, 10**7))

    def _uuid(self) -> str:
        return str(uuid.UUID(int=self.generator.getrandbits(128), version=4))


@cache
def _adjectives_and_nouns() -> tuple[list[str], list[str]]:
    words = RandomWord()
    adjectives, nouns = (words.filter(include_categories=[kind]) for kind in ("adjective", "noun"))
    return sorted(filter(str.isalpha, adjectives)), sorted(filter(str.isalpha, nouns))


def _haystack(
    task: TaskDefinition, generator: random.Random, names: _Names, essay: Essay | None
) -> Callable[[int], list[str]]:
    """A function from a size (words of an essay, sentences of noise, needles) to that much haystack, in lines."""
    if task.haystack == "noise":
        return _noise
    if task.haystack == "essay":
        assert essay is not None
        start = generator.randrange(len(essay.sentences))
        return lambda words: essay.lines(start, words)
    drawn: list[str] = []

    def lines(count: int) -> list[str]:
        while len(drawn) < count:
            drawn.append(names.needle(names.key(), names.value()))
        return drawn[:count]

    return lines


def _noise(sentences: int) -> list[str]:
    """Five sentences to a line."""
    whole, rest = divmod(sentences, len(NOISE))
    return [" ".join(NOISE)] * whole + ([" ".join(NOISE[:rest])] if rest else [])


def _line_at(depth: float, lines: list[str]) -> int:
    """Index of the line before which the share of characters is nearest to `depth`."""
    starts = [0, *accumulate(len(line) + 1 for line in lines)]
    after = min(bisect_left(starts, depth * starts[-1]), len(lines))
    before = max(after - 1, 0)
    return min(before, after, key=lambda index: abs(starts[index] - depth * starts[-1]))


def _longest_that_fits(
    compose: Callable[[int, int], str], tokenizer: PreTrainedTokenizerBase, length: int, *, fill: bool
) -> tuple[str, list[int]]:
    """The longest text of at most `length` tokens, to half a percent, and its tokens.

    compose: makes the text from the size of its haystack and a number of sentences of noise that fill it up.
    """

    def tokenized(size: int, filling: int = 0) -> tuple[str, list[int]]:
        text = compose(size, filling)
        return text, encode_texts(tokenizer, [text])[0]

    close_enough = length - length // 200
    low, best = 0, tokenized(0)
    if len(best[1]) > length:
        raise UserError(
            "needles.lengths", f"{length} tokens are too few; needles and question alone have {len(best[1])}"
        )
    guesses = _Guesses(length, len(best[1]))
    while len(best[1]) < close_enough and (size := guesses.next()) is not None:
        candidate = tokenized(size)
        guesses.add(size, len(candidate[1]))
        if len(candidate[1]) <= length:
            low, best = size, candidate
    filling = 1
    while fill and len(best[1]) < close_enough and len((candidate := tokenized(low, filling))[1]) <= length:
        best, filling = candidate, filling + 1
    return best


class _Guesses:
    """Searches the largest size of at most `length` tokens, given that tokens grow nearly in proportion to the size.

    A long text is tokenised three or four times, where bisection would need sixteen.
    """

    def __init__(self, length: int, tokens_without: int) -> None:
        self.length, self.tokens_without = length, tokens_without
        self.low, self.low_tokens = 0, tokens_without
        self.high: int | None = None
        self.high_tokens = 0
        self.made = 0

    def next(self) -> int | None:
        """A size to try; None when no size is left between one that fits and one that does not."""
        self.made += 1
        missing = self.length - self.low_tokens
        if self.high is None:
            if self.low_tokens == self.tokens_without:
                return 2 * self.low + 8
            return self.low + 1 + int(1.01 * missing * self.low / (self.low_tokens - self.tokens_without))
        between = self.high - self.low
        if between == 1:
            return None
        if self.made > 8:  # the rest is too small for the proportion to hold
            return self.low + between // 2
        share = (missing - self.length // 400) / (self.high_tokens - self.low_tokens)
        return self.low + min(max(int(share * between), 1), between - 1)

    def add(self, size: int, tokens: int) -> None:
        """The number of tokens of a size that was tried."""
        if tokens <= self.length:
            self.low, self.low_tokens = size, tokens
        else:
            self.high, self.high_tokens = size, tokens


def _cut_long(words: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(words), LONGEST_SENTENCE):
        yield words[start : start + LONGEST_SENTENCE]


def _enumerated(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
