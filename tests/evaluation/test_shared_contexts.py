"""Requests of one context that are scored together score as lm-eval scores them one by one."""

import random

import pytest
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM

from distillkit.evaluation.generation import can_fork
from distillkit.evaluation.shared_contexts import SharedContextLM

from ..student.students import VOCABULARY, student
from ..training.tiny import llama
from ..training.tiny import tokenizer as byte_tokenizer


def requests():
    """Questions of 2 to 5 options, of one token and of several; among them requests that share nothing, and windows."""
    draw = random.Random(0)

    def tokens(count):
        return draw.choices(range(3, VOCABULARY), k=count)

    found = []
    for question in range(9):
        context = tokens(draw.randrange(6, 40))
        longest = 1 if question == 4 else 6 if question < 8 else 60  # the last is not worth it
        found += [
            ((f"q{question}", f" {n}"), context, tokens(draw.randrange(1, longest + 1)))
            for n in range(2 + question % 4)
        ]
    found += [(("alone", " x"), tokens(5), tokens(3)), (None, [1], tokens(30)), (None, [1], tokens(30))]
    too_long = tokens(60)
    found += [(("long", f" {n}"), too_long, tokens(9)) for n in range(2)]
    draw.shuffle(found)
    return found


@pytest.mark.parametrize("layout", [None, "hybrid", "kda_only"])
def test_scores_are_those_of_requests_one_by_one(layout):
    model = llama(3, vocab=VOCABULARY) if layout is None else student(layout=layout)
    asked = requests()
    scores, told, read = {}, [], []

    def count(module, args, kwargs):
        input_ids = (args or [kwargs["input_ids"]])[0]
        assert len(input_ids) <= 10
        read[-1] += input_ids.numel()

    model.register_forward_pre_hook(count, with_kwargs=True)
    for kind in (HFLM, SharedContextLM):
        lm = kind(pretrained=model, tokenizer=byte_tokenizer(), backend="causal", batch_size=10, max_length=64)
        lm.cache_hook.add_partial = lambda attr, texts, answer: told.append((texts, answer))
        told.clear()
        read.append(0)
        scores[kind] = lm._loglikelihood_tokens(asked, disable_tqdm=True)
        assert sorted(map(str, told)) == sorted(
            str((texts, answer)) for (texts, *_), answer in zip(asked, scores[kind], strict=True) if texts is not None
        )
    for (ours, likeliest), (theirs, same) in zip(scores[SharedContextLM], scores[HFLM], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5) and likeliest == same
    assert read[1] < 0.8 * read[0]


@pytest.mark.parametrize("kind", ["openai-gpt", "rwkv", "mamba"])
def test_models_without_a_cache_that_can_be_repeated_are_left_to_lm_eval(kind):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **sizes)
    assert not can_fork(AutoModelForCausalLM.from_config(config).eval())
