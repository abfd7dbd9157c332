"""Models are measured on the tokens that both know, and refused where these are not the same tokens."""

import pytest
from transformers import PreTrainedTokenizerFast

from distillkit.config.errors import UserError
from distillkit.teacher.vocabulary import check_same_tokenizer, common_vocabulary
from tests.training.tiny import BYTES, llama, tokenizer


def test_equal_heads_need_no_cut():
    assert common_vocabulary(llama(0, vocab=BYTES), llama(1, vocab=BYTES), tokenizer()) is None


def test_heads_padded_differently_share_the_tokenizers_tokens():
    assert common_vocabulary(llama(0, vocab=320), llama(1, vocab=BYTES + 1), tokenizer()) == BYTES


def test_a_head_too_narrow_for_the_tokenizer_is_named():
    with pytest.raises(UserError, match=f"student: its head has 97 columns, but the tokenizer knows {BYTES} tokens"):
        common_vocabulary(llama(0, vocab=BYTES), llama(1), tokenizer())


def test_a_tokenizer_with_more_special_tokens_is_the_same():
    more = tokenizer()
    more.add_tokens(["<think>"])
    check_same_tokenizer(tokenizer(), more)


def test_a_tokenizer_with_other_numbers_is_not():
    state = (
        tokenizer().backend_tokenizer.to_str().replace('"z":', '"zz":').replace('"y":', '"z":').replace('"zz":', '"y":')
    )
    other = PreTrainedTokenizerFast(tokenizer_object=type(tokenizer().backend_tokenizer).from_str(state))
    with pytest.raises(UserError, match="its tokenizer is not the student's: 'y' is"):
        check_same_tokenizer(other, tokenizer())
