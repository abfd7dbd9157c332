"""Continuations are the model's own, and the same for the same seed."""

import torch

from distillkit.evaluation import generate_samples
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
