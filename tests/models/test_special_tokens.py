"""A text has the special tokens of its tokenizer once, and a prompt none behind it."""

import pytest
from tokenizers.processors import TemplateProcessing

from distillkit.models.special_tokens import encode_texts, prompt_tokenizer, special_tokens_around
from tests.training.tiny import tokenizer

BOS, EOS = 1, 2


def adding(template):
    made = tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(template, None, [("<s>", BOS), ("</s>", EOS)])
    return made


TEMPLATES = {"$A": ([], []), "<s> $A": ([BOS], []), "$A </s>": ([], [EOS]), "<s> $A </s>": ([BOS], [EOS])}


@pytest.mark.parametrize(("template", "around"), TEMPLATES.items())
def test_once_before_and_behind_only_what_is_closed(template, around):
    made, (before, behind) = adding(template), around
    (bare,) = made(["ab"], add_special_tokens=False).input_ids
    assert special_tokens_around(made) == around
    begun = ["ab", "<s>ab"] if before else ["ab"]
    assert encode_texts(made, begun) == [before + bare] * len(begun)
    ended = [*begun, *(text + "</s>" for text in begun)] if behind else begun
    assert encode_texts(made, ended, closed=True) == [before + bare + behind] * len(ended)
    assert encode_texts(made, [""]) == [before]
    assert prompt_tokenizer(made)(["ab", ""]).input_ids == [before + bare, before]
    assert made("ab").input_ids == before + bare + behind  # its own ways have not changed
    assert (prompt_tokenizer(made) is made) == (not behind)
