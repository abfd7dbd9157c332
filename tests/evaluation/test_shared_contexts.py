"""Requests of one context that are scored together score as lm-eval scores them one by one."""

import random

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM

from distillkit.config.errors import UserError
from distillkit.evaluation.generation import can_fork, likelihoods, score_continuations, score_last_tokens
from distillkit.evaluation.shared_contexts import SharedContextLM

from ..student.students import VOCABULARY, student
from ..training.tiny import llama
from ..training.tiny import tokenizer as byte_tokenizer
from .largest_tensor import LargestTensor


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


def test_a_context_of_many_requests_leaves_other_batches_full(monkeypatch):
    """As where one context stands in several questions."""
    contexts = [[*range(3, 23), first] for first in range(30, 43)]
    asked = [
        (("", ""), context, [7 + option, 9]) for context in contexts for option in range(9 if context[-1] == 35 else 2)
    ]
    batches = []
    monkeypatch.setattr(
        "distillkit.evaluation.shared_contexts.score_continuations",
        lambda model, read, *rest, **options: (
            batches.append(len(read)) or score_continuations(model, read, *rest, **options)
        ),
    )
    lm = SharedContextLM(pretrained=llama(3, vocab=VOCABULARY), tokenizer=byte_tokenizer(), batch_size=8)
    assert len(lm._loglikelihood_tokens(asked)) == len(asked)
    assert batches == [4, 1, 1, 4, 3]


def test_texts_are_encoded_as_one_by_one(monkeypatch):
    texts = [("How many?", " two"), ("How many? ", "two"), ("", "so"), ("<s>once", " more"), ("How many?", " two")]
    seen = []
    for kind in (HFLM, SharedContextLM):
        lm = kind(pretrained=llama(3, vocab=VOCABULARY), tokenizer=byte_tokenizer(), batch_size=8)
        lm.tokenizer.add_special_tokens({"bos_token": "<s>"})
        monkeypatch.setattr(kind, "_loglikelihood_tokens", lambda self, asked, **options: seen.append(asked))
        lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in texts])
    assert seen[0] == seen[1] and len(seen[0]) == len(texts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_likelihoods_need_little_memory(dtype, monkeypatch):
    """A few logits at a time, rounded as they are; the first of equal logits is the likeliest."""
    monkeypatch.setattr("distillkit.evaluation.generation.CHUNK_BYTES", 4 * 50 * 3)
    logits = torch.randn(2, 6, 50, generator=torch.Generator().manual_seed(0)).mul(4).to(dtype)
    logits[1, 5, [7, 30]] = 20
    asked = [(row, column, (7 * column) % 50) for row in (1, 0) for column in range(6)] + [(1, 5, 7), (1, 5, 30)]
    for in_dtype in (False, True):
        with LargestTensor() as largest:
            chosen, likeliest = likelihoods(logits, asked, in_dtype=in_dtype)
        assert largest.elements <= 3 * 50
        rounded = logits.log_softmax(-1) if in_dtype else logits.float().log_softmax(-1)
        assert chosen.tolist() == [rounded[place].item() for place in asked]
        best = (rounded if in_dtype else logits).argmax(-1)
        assert likeliest.tolist() == [best[row, column] == token for row, column, token in asked]
        assert likeliest[-2:].tolist() == [1, 0]
    logits[0, 2, 3] = torch.nan
    with pytest.raises(UserError, match="not numbers"):
        likelihoods(logits, asked)


def test_logits_of_contexts_are_not_computed():
    model = llama(3, vocab=VOCABULARY)
    kept = []
    model.lm_head.register_forward_pre_hook(lambda module, args: kept.append(args[0].shape[1]))
    rows, options = [[*range(3, 40)], [*range(5, 41)]], [[[9], [11]], [[8, 7, 40], [12]]]
    with torch.no_grad():
        scores = score_last_tokens(model, rows, options)
        assert kept == [4]
        for row, of, found in zip(rows, options, scores, strict=True):
            for tokens, score in zip(of, found, strict=True):
                logits = model(torch.tensor([row])).logits[0, -len(tokens) :].log_softmax(-1)
                expected = logits.gather(-1, torch.tensor(tokens)[:, None]).sum().item()
                assert score.log_probability == pytest.approx(expected, rel=1e-6)
                assert score.likeliest == (logits.argmax(-1).tolist() == tokens)
