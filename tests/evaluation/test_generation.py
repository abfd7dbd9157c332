"""Reading in pieces and decoding from the cache change neither logits nor tokens, for teachers and every student."""

from itertools import islice

import pytest
import torch

from distillkit.evaluation.generation import decode_greedily, prefill

from ..model.students import student, tokens
from ..training.tiny import llama

MODELS = {
    "teacher": lambda: llama(0, vocab=128),
    "hybrid": lambda: student(layout="hybrid"),
    "hybrid with rope": lambda: student(layout="hybrid", use_rope=True),
    "kda_only": lambda: student(layout="kda_only"),
    "grouped": lambda: student(layout="hybrid", kv_heads="grouped"),
    "mistral": lambda: student("mistral", layout="hybrid", config_changes={"sliding_window": 50}),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_pieces_equal_the_whole(name):
    model = MODELS[name]().double()
    ids = tokens(2, 130)
    expected = model(ids, use_cache=False).logits[:, -1]
    for piece in (31, 64, 129, 1000):
        logits, cache = prefill(model, ids, piece)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
        assert cache.get_seq_length() == 130


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_tokens_are_those_without_a_cache(name):
    model = MODELS[name]().double()
    ids = tokens(1, 90)
    expected = ids
    for _ in range(12):
        following = model(expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, following], dim=1)
    written = torch.stack(list(islice(decode_greedily(model, *prefill(model, ids, 64)), 12)), dim=1)
    assert torch.equal(written, expected[:, 90:])
