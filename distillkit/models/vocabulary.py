"""Whether two models number the same tokens alike.

Models of one family share a tokenizer and still differ at its end: embeddings are padded to other widths, and special
tokens are added for a later use. What both know is then the tokens that both tokenizers number; columns beyond are as
if they were not there. Tokenizers are the same if they number the same tokens alike. The student's alone reads text, so
where the teacher's would cut it otherwise both still see the same tokens; but the teacher has learnt from text cut its
own way, and its distributions are less accurate elsewhere. A warning shows an example; the user decides.
"""

import json
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distillkit.config.errors import UserError
from distillkit.models.decoder import head
from distillkit.models.loading import load_tokenizer

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")

_TEXTS = (
    "The quick brown fox, aged 12345 (or 3.14159?), can't jump OVER it; we'll see... #1!",
    "  two spaces\n\n\tand a tab\r\n    indented = f(x)[0] // 2  # comment \n",
    "Größe, naïve, e\u0301 and é, ﬁ, Ⅷ, ½, İstanbul, \uff21\uff22, zero\u200bwidth, non\u00a0breaking",
    "Съешь ещё этих мягких французских булок, 速い茶色の狐, 한국어, مرحبا بالعالم, ไทย, हिन्दी",
    "🙂👩‍👩‍👧 \U0001f1e9\U0001f1ea \ue000 \U00010348 http://a-b.c/d_e?f=g&h=%20 x@y.z $9,999.00 aaaaaaaa !!!!!!",
)
"""What tokenizers treat differently: digits, spaces, case, contractions, composed letters, scripts, bytes."""


def common_vocabulary(teacher_columns: int, student: PreTrainedModel, *tokenizers: PreTrainedTokenizerBase) -> int:
    """Columns that both heads have and that mean tokens of all tokenizers.

    teacher_columns: those of the teacher's head. A head may be wider than the tokenizer, for padding, or narrower,
        where a token was added to the tokenizer alone.
    """
    return min(teacher_columns, head(student)[0].shape[0], *map(_size, tokenizers))


def check_known_tokens(rows: Dataset, vocabulary_size: int, tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    """Raises UserError where rows (of `input_ids`) hold a token beyond the common vocabulary; `key` named the rows."""
    for batch in rows.select_columns("input_ids").with_format("arrow").iter(batch_size=1000):
        largest = pc.max(pc.list_flatten(batch["input_ids"])).as_py()
        if largest is not None and largest >= vocabulary_size:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise UserError(
                key,
                f"holds token {largest} ({token!r}), which the teacher and the student do not both know; remove "
                "it from the text, or from the chat template that brings it",
            )


def load_students_tokenizer(
    path: str, teacher: PreTrainedTokenizerBase, key: str, **options: Any
) -> PreTrainedTokenizerBase:
    """The student's tokenizer, checked against the teacher's; the teacher's itself where the student's folder has none.

    key, options: as for `load_tokenizer`.

    Raises UserError where there is one that cannot be read, or that numbers other tokens.
    """
    folder = Path(path).expanduser()
    if folder.is_dir() and options.get("gguf_file") is None and not has_tokenizer(folder):
        return teacher
    student = load_tokenizer(path, key=key, **options)
    try:
        check_same_tokenizer(teacher, student)
    except UserError as error:
        raise UserError(error.key, f"{error.problem}; use another, or teacher.tokenizer: own") from None
    return student


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder of a model holds its tokenizer, too."""
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


def check_same_tokenizer(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, key: str = "teacher"
) -> None:
    """Raises UserError where a token has two numbers, or a number two tokens; warns of a text that is cut in two ways.

    Special tokens that only one of them has, or that have another name in each, are no difference. `key` of the YAML
    named the teacher.
    """
    both_fast = isinstance(teacher, PreTrainedTokenizerFast) and isinstance(student, PreTrainedTokenizerFast)
    if both_fast and tokenizer_state(teacher) == tokenizer_state(student):
        return  # as mostly; to cut the text of every token takes seconds
    _check_numbers(teacher, student, key)
    for texts in _probes(teacher, student):
        if (cuts := _different_cuts(teacher, student, texts)) is not None:
            logger.warning("%s: its tokenizer cuts text otherwise than the student's, which reads it: %s", key, cuts)
            return


def tokenizer_state(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """All that a tokenizer is, but for what its last call left."""
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return {**state, "truncation": None, "padding": None}


def _size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest number of a token."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _different(key: str, what: str) -> UserError:
    return UserError(key, f"its tokenizer is not the student's: {what}")


def _check_numbers(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, key: str) -> None:
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    for token in sorted(theirs.keys() & ours.keys(), key=ours.__getitem__):
        if theirs[token] != ours[token]:
            raise _different(key, f"{token!r} is {theirs[token]} for the teacher and {ours[token]} for the student")
    added = {*teacher.get_added_vocab().values(), *student.get_added_vocab().values()}
    names = {number: token for token, number in theirs.items()}
    for token, number in ours.items():
        if number in names and names[number] != token and number not in added:
            raise _different(key, f"{number} is {names[number]!r} for the teacher and {token!r} for the student")


def _probes(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> Iterator[Sequence[str]]:
    """Texts of many kinds; then the text of every token, and these run together, where merges show."""
    of_one_alone = teacher.get_added_vocab().keys() ^ student.get_added_vocab().keys()
    yield [start + word for text in _TEXTS for word in text.split(" ") for start in ("", " ")]
    yield _TEXTS
    words = {
        tokenizer.convert_tokens_to_string([token])
        for tokenizer, other in ((student, {}), (teacher, student.get_vocab()))
        for token in tokenizer.get_vocab().keys() - other.keys() - of_one_alone
    }
    in_order = sorted(word for word in words if not any(name in word for name in of_one_alone))
    mixed = random.Random(0).sample(in_order, len(in_order))
    together = ["".join(mixed[start : start + 4]) for start in range(0, len(mixed), 4)]
    yield [*in_order, *(text for text in together if not any(name in text for name in of_one_alone))]


def _different_cuts(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, texts: Sequence[str]
) -> str | None:
    """The shortest of the texts that has two cuts, and these."""
    cuts = [
        tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids for tokenizer in (teacher, student)
    ]
    different = [text for text, theirs, ours in zip(texts, *cuts, strict=True) if theirs != ours]
    if not different:
        return None
    text = min(different, key=len)
    by = [" ".join(map(repr, tokenizer.tokenize(text))) for tokenizer in (teacher, student)]
    return f"{text!r} is cut into {by[0]} by the teacher's, {by[1]} by the student's"
