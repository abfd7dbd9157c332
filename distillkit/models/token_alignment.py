"""Two tokenizers over one text: which tokens of theirs are the same bytes of it.

A token of each is a piece of the text's bytes. Where a piece of one starts and ends as a piece of the other does, the
two are one to one: behind the same text, both models predict the same bytes. Special tokens are no text: they are the
same where they have the same name, and the two EOS where neither has a namesake. Before a text the teacher has what its
own tokenizer puts there, whatever BOS the student has.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
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
        self._special = _same_names(student, teacher)
        ours, theirs = student.eos_token_id, teacher.eos_token_id
        without_namesake = ours not in self._special and theirs not in self._special.values()
        self._eos = {ours: theirs} if None not in (ours, theirs) and without_namesake else {}
        self._special |= self._eos

    @cached_property
    def shared(self) -> tuple[Int[Tensor, " shared"], Int[Tensor, " shared"]]:
        """Ids of the tokens that both have, the student's and the teacher's; none of them twice."""
        ours, theirs = (each.id_of for each in self._pieces)
        both = {ours[piece]: theirs[piece] for piece in ours.keys() & theirs.keys()}
        taken = set(both.values())
        both |= {our: their for our, their in self._special.items() if their not in taken}
        ids = torch.tensor(sorted(both.items()), dtype=torch.long).view(-1, 2)
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
        if same is None or (place == 0 and token in self._eos):  # before a text, an EOS is a BOS
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
        read = b"".join(other)
        # A document may be cut within a character, of which up to 3 bytes are left at its beginning or end.
        cut = next((length for length in range(4) if raw[length : length + len(read)] == read), None)
        if cut is None:  # one of them changes text, or lacks a character of it
            return
        ends = {cut + end: index for index, end in enumerate(_ends(other))}
        for index, end in enumerate(_ends(pieces)):
            same = ends.get(end)
            if same is not None and other[same] == pieces[index]:
                places[start + index] = first_new + same


class _Pieces:
    """The bytes of a tokenizer's tokens; `key` of the YAML named it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, key: str) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise UserError(key, f"needs a fast tokenizer (tokenizer.json), and has a {type(tokenizer).__name__}")
        kinds = str(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
        if "ByteLevel" not in kinds and SPACE not in kinds:
            raise UserError(key, "is neither byte-level BPE nor SentencePiece, whose tokens are pieces of text")
        self._by_bytes = "ByteLevel" in kinds
        added = {each.content for each in tokenizer.added_tokens_decoder.values()}
        self.special = {index for index, each in tokenizer.added_tokens_decoder.items() if each.special}
        self.id_of: dict[bytes, int] = {}
        """Tokens that are not special. Of several for the same bytes it is not the one of a byte, which stands for what
        has no other token, and else the first."""
        self.of_id: dict[int, bytes] = {}
        numbered = sorted(tokenizer.get_vocab().items(), key=lambda each: (self._is_byte(each[0]), each[1]))
        for token, index in numbered:
            self.of_id[index] = token.encode() if self._by_bytes and token in added else self._bytes(token)
            if index not in self.special:
                self.id_of.setdefault(self.of_id[index], index)
        mark = next((tokenizer.added_tokens_decoder[index].content for index in sorted(self.special)), "")
        self._space_first, self._space_behind_special = (self._puts_space(tokenizer, before) for before in ("", mark))

    def of(self, ids: Sequence[int], *, first: bool) -> list[bytes]:
        """The bytes of each token of a text, which is the first of a document or stands behind a special token.

        Some tokenizers put a space before it, which is none of it.
        """
        pieces = [self.of_id[index] for index in ids]
        put = self._space_first if first else self._space_behind_special
        if put and pieces and pieces[0].startswith(b" "):
            pieces[0] = pieces[0][1:]
        return pieces

    def _puts_space(self, tokenizer: PreTrainedTokenizerBase, before: str) -> bool:
        ids = tokenizer(f"{before}a", add_special_tokens=False, verbose=False).input_ids
        pieces = [self.of_id[index] for index in ids if index not in self.special]
        return bool(pieces) and pieces[0].startswith(b" ")

    def _is_byte(self, token: str) -> bool:
        return not self._by_bytes and len(token) == 6 and token.startswith("<0x") and token.endswith(">")

    def _bytes(self, token: str) -> bytes:
        if self._by_bytes:
            known = all(character in _BYTE_OF for character in token)
            return bytes(_BYTE_OF[character] for character in token) if known else token.encode()
        if self._is_byte(token):
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


def _same_names(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> dict[int, int]:
    """The teacher's added tokens by the student's, where one of the two is special."""
    names = {each.content: (index, each.special) for index, each in teacher.added_tokens_decoder.items()}
    return {
        index: names[each.content][0]
        for index, each in student.added_tokens_decoder.items()
        if each.content in names and (each.special or names[each.content][1])
    }
