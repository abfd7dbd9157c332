"""Whether two models speak of the same tokens.

Models of one family share a tokenizer and still have heads of different widths, because embeddings are padded. What
both know is then the tokenizer's tokens; columns beyond are as if they were not there.
"""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distillkit.config.errors import UserError
from distillkit.teacher.decoder import head


def common_vocabulary(
    teacher: PreTrainedModel, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> int | None:
    """Columns of both heads that mean tokens of the tokenizer; None where the heads are equally wide.

    Raises UserError where the heads differ and one is too narrow for the tokenizer.
    """
    widths = {"teacher": head(teacher)[0].shape[0], "student": head(student)[0].shape[0]}
    if len(set(widths.values())) == 1:
        return None
    tokens: int = max(tokenizer.get_vocab().values()) + 1
    for role, width in widths.items():
        if width < tokens:
            raise UserError(f"{role}: its head has {width} columns, but the tokenizer knows {tokens} tokens")
    return tokens


def check_same_tokenizer(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Raises UserError where a token that both tokenizers know has another number, or where they share few tokens."""
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    shared = theirs.keys() & ours.keys()
    for token in sorted(shared, key=ours.__getitem__):
        if theirs[token] != ours[token]:
            raise UserError(
                f"teacher: its tokenizer is not the student's: {token!r} is {theirs[token]} for the teacher and "
                f"{ours[token]} for the student"
            )
    if 2 * len(shared) < min(len(theirs), len(ours)):
        raise UserError(
            f"teacher: its tokenizer is not the student's: of {len(theirs)} and {len(ours)} tokens, {len(shared)} "
            "are the same"
        )
