"""Two tokenizers over one text: which tokens of theirs are the same bytes of it.

A token of each is a piece of the text's bytes. Where a piece of one starts and ends as a piece of the other does, the
two are one to one: behind the same text, both models predict the same bytes. Special tokens are no text: they are the
same where they have the same name, and BOS and EOS by what they are.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from distillkit.config.errors import UserError
from distillkit.models.special_tokens import special_tokens_around

KEY = "teacher.tokenizer"
SPACE = "\u2581"
"""How SentencePiece writes a space."""


@dataclass(frozen=True)
class Pairs:
    """A document of the student's in the teacher's tokens.

    teacher_ids: the teacher's tokens of the same text, with what it puts before a text.
    places: for each token of the student's, the place of the teacher's token that is the same; -1 where there is none.
    """

    teacher_ids: list[int]
    places: list[int]


class TokenAlignment:
    """The tokens of a student's and a teacher's tokenizer.

    Raises `UserError` for a tokenizer whose tokens are not pieces of text.
    """

    def __init__(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
        self.teacher = teacher
        self._pieces = _Pieces(student, "model"), _Pieces(teacher, KEY)
        self._before, _ = special_tokens_around(teacher)
        self._special = _same_specials(student, teacher)

    @cached_property
    def shared(self) -> tuple[Int[Tensor, " shared"], Int[Tensor, " shared"]]:
        """Ids of the tokens that both have, the student's and the teacher's."""
        ours, theirs = ({piece: index for index, piece in each.of_id.items()} for each in self._pieces)
        both = [(ours[piece], theirs[piece]) for piece in ours.keys() & theirs.keys()]
        ids = torch.tensor(sorted({*both, *self._special.items()}), dtype=torch.long)
        return ids[:, 0].contiguous(), ids[:, 1].contiguous()

    def align(self, ids: Sequence[int]) -> Pairs:
        """A document of the student's tokens."""
        teacher_ids, places = list(self._before), [-1] * len(ids)
        start = 0
        while start < len(ids):
            if ids[start] in self._pieces[0].special:
                self._add_special(ids[start], start, teacher_ids, places)
                start += 1
                continue
            end = start
            while end < len(ids) and ids[end] not in self._pieces[0].special:
                end += 1
            self._add_text(ids[start:end], start, teacher_ids, places)
            start = end
        return Pairs(teacher_ids, places)

    def _add_special(self, token: int, place: int, teacher_ids: list[int], places: list[int]) -> None:
        """What the teacher has before a text already is not put there again; what it does not know is left out."""
        same = self._special.get(token)
        if same is None:
            return
        if place == 0 and teacher_ids == [same]:
            places[0] = 0
            return
        places[place] = len(teacher_ids)
        teacher_ids.append(same)

    def _add_text(self, ids: Sequence[int], start: int, teacher_ids: list[int], places: list[int]) -> None:
        ours, theirs = self._pieces
        pieces = ours.of(ids, first=start == 0)
        raw = b"".join(pieces)
        text = raw.decode(errors="ignore")
        new_ids = self.teacher(text, add_special_tokens=False, verbose=False).input_ids
        other = theirs.of(new_ids, first=True)
        first_new = len(teacher_ids)
        teacher_ids.extend(new_ids)
        if b"".join(other) != raw:  # a character that is cut in two, or text that one of them changes
            return
        ends = {end: index for index, end in enumerate(_ends(other))}
        for index, end in enumerate(_ends(pieces)):
            same = ends.get(end)
            if same is not None and other[same] == pieces[index]:
                places[start + index] = first_new + same


class _Pieces:
    """The bytes of a tokenizer's tokens; `key` of the YAML named it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, key: str) -> None:
        decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] if tokenizer.is_fast else None
        kinds = str(decoder)
        if "ByteLevel" not in kinds and SPACE not in kinds:
            raise UserError(key, "is neither byte-level BPE nor SentencePiece, whose tokens are pieces of text")
        self._by_bytes = "ByteLevel" in kinds
        added = {each.content: each for each in tokenizer.added_tokens_decoder.values()}
        self.special = {index for index, each in tokenizer.added_tokens_decoder.items() if each.special}
        self.of_id: dict[int, bytes] = {}
        for token, index in tokenizer.get_vocab().items():
            if index not in self.special:
                self.of_id[index] = token.encode() if token in added else self._bytes(token)

    def of(self, ids: Sequence[int], *, first: bool) -> list[bytes]:
        """The bytes of each token. SentencePiece puts a space before the first word of a text, which is none of it."""
        pieces = [self.of_id[index] for index in ids]
        if first and not self._by_bytes and pieces and pieces[0].startswith(b" "):
            pieces[0] = pieces[0][1:]
        return pieces

    def _bytes(self, token: str) -> bytes:
        if self._by_bytes:
            known = all(character in _BYTE_OF for character in token)
            return bytes(_BYTE_OF[character] for character in token) if known else token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, " ").encode()


_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


def _ends(pieces: Sequence[bytes]) -> list[int]:
    """Where each piece ends in the bytes of all."""
    ends, end = [], 0
    for piece in pieces:
        end += len(piece)
        ends.append(end)
    return ends


def _same_specials(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> dict[int, int]:
    """The teacher's special tokens by the student's."""
    names = {each.content: index for index, each in teacher.added_tokens_decoder.items() if each.special}
    same = {
        index: names[each.content]
        for index, each in student.added_tokens_decoder.items()
        if each.special and each.content in names
    }
    for name in ("bos_token_id", "eos_token_id"):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours is not None and theirs is not None:
            same.setdefault(ours, theirs)
    return same
