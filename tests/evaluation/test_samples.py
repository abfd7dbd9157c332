"""Continuations are the model's own, and the same for the same seed."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from distillkit.config import UserError
from distillkit.evaluation import check_prompts, generate_samples
from tests.training.tiny import BYTES, llama, tokenizer

MODEL = llama(0, vocab=BYTES)


def write(**options):
    (sample,) = generate_samples(MODEL, tokenizer(), ["1 2 3"], max_new_tokens=12, **options)
    return sample.continuation


def test_temperature_0_takes_the_likeliest_token_always():
    ids = tokenizer()("1 2 3", return_tensors="pt").input_ids
    for _ in range(12):
        ids = torch.cat([ids, MODEL(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert write(temperature=0) == tokenizer().decode(ids[0, 5:], skip_special_tokens=True)


def test_the_seed_decides_and_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = write(seed=1)
    assert torch.rand(1) == expected
    assert write(seed=1) == first != write(seed=2)


def test_a_prompt_is_continued_and_not_closed():
    """A tokenizer that appends EOS to a text would have the student write after the end."""
    closing = tokenizer()
    closing.backend_tokenizer.post_processor = TemplateProcessing("$A </s>", None, [("</s>", 2)])
    (closed,), (bare,) = (
        generate_samples(MODEL, each, ["1 2 3"], max_new_tokens=12, temperature=0) for each in (closing, tokenizer())
    )
    assert closed == bare


def test_a_prompt_without_a_token_is_told():
    with pytest.raises(UserError, match=r"evaluation\.prompts\[1\]: '' becomes no token; give some text, or remove it"):
        check_prompts(tokenizer(), ["a", ""])
    beginning = tokenizer()
    beginning.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", None, [("<s>", 1)])
    check_prompts(beginning, [""])
