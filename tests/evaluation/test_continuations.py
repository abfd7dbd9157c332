"""What is said of continuations, against hand-made ones; and what models write, against plain forwards."""

import json
import random

import pytest
import torch

from distillkit.config.errors import UserError
from distillkit.config.evaluate import EvaluateConfig, GenerationSuiteConfig
from distillkit.evaluation import evaluate
from distillkit.evaluation.continuations import (
    Written,
    draw,
    ends_in_loop,
    first_difference,
    measure_continuations,
    read_prompts,
    repeated_grams,
    write,
)
from distillkit.evaluation.generation import log_probability
from distillkit.evaluation.model_spec import ModelSpec

from ..student.students import student, tokens
from ..training.tiny import llama, save_llama, save_text
from ..training.tiny import tokenizer as byte_tokenizer

END = 2


def settings(**changes):
    return GenerationSuiteConfig.parse({"dataset": {"disk_path": "x"}, **changes})


@pytest.mark.parametrize(
    ("written", "repeated", "grams"),
    [([1, 2, 3], 0, 0), ([1, 2, 3, 4, 5], 0, 2), ([7] * 6, 2, 3), ([1, 2, 3, 4, 9, 1, 2, 3, 4], 1, 6)],
)
def test_repeated_grams(written, repeated, grams):
    assert repeated_grams(written) == (repeated, grams)


@pytest.mark.parametrize(
    ("written", "loop"),
    [
        ([5] * 16, True),
        ([5] * 15, False),  # too short
        ([9, 8, *[5] * 16], True),
        ([*[5] * 16, 9], False),  # it left the loop
        ([1, 2, 3, 4, 5, 6] * 3, True),
        ([1, 2, 3, 4, 5, 6, 7] * 2 + [1, 2, 3], False),  # not three rounds
        ([1, 2, 3, 4, 5, 6, 7] * 2 + [1, 2, 3, 4, 5, 6, 7], True),
        ([2, 3, *[1, 2, 3] * 5, 1], True),  # 18 tokens; cut in the middle of a round
    ],
)
def test_loops(written, loop):
    assert ends_in_loop(written) is loop


def test_loops_are_those_of_the_definition():
    rng = random.Random(0)
    for _ in range(300):
        written = [rng.randrange(2) for _ in range(rng.randrange(30))]
        written += [rng.randrange(2) for _ in range(rng.randrange(1, 9))] * rng.randrange(5)
        expected = any(
            all(a == b for a, b in zip(written[-length:], written[-length + period :], strict=False))
            for length in range(16, len(written) + 1)
            for period in range(1, length // 3 + 1)
        )
        assert ends_in_loop(written) is expected


def test_the_first_difference():
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference([1, 2], [1, 2, 4]) == 2
    assert first_difference([5], [6]) == 0


def test_numbers_of_hand_made_continuations():
    """Two prompts: one answered alike, one that differs from its third token on and ends early."""
    loop = [8, 9] * 8
    theirs = Written([loop, [1, 2, 3, 4, 5, 6]], [[1, 2], [3, END]], frozenset({END}), [-1.0, -3.0])
    ours = Written([loop, [1, 2, 7, END]], [[1, 2, 3], [4]], frozenset({END}), [-4.0, -4.0])
    found = measure_continuations(ours, theirs, 16)
    assert found["greedy"] == {
        "repeated_4grams": 11 / 13,
        "loops": 0.5,
        "ended": 0.5,
        "tokens": 9.5,
        "tokens_at_end": 3.0,
        "standard_errors": found["greedy"]["standard_errors"],
    }
    assert found["sampled"]["repeated_4grams"] is None and found["sampled"]["ended"] == 0
    assert found["sampled"]["tokens_at_end"] is None
    assert (found["log_probability"], found["log_probability_difference"]) == (-2.0, -1.0)
    assert (found["agreement"], found["first_difference"], found["identical"]) == (18 / 22, 9, 0.5)
    assert [(row["tokens"], row["agreement"], row["identical"]) for row in found["by_length"]] == [
        (1, 1, 1),
        (2, 1, 1),
        (4, 6 / 8, 0.5),
        (8, 10 / 14, 0.5),
        (16, 18 / 22, 0.5),
    ]
    # of two halves, one of them 1 and one 0, the jackknife's error is 1/2
    assert found["standard_errors"]["identical"] == pytest.approx(0.5)
    alone = measure_continuations(Written(ours.greedy, ours.sampled, ours.ends), None, 16)
    assert alone == {name: found[name] for name in ("samples", "greedy", "sampled")}


def test_draws_have_the_probabilities_of_the_model():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]])
    numbers = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    drawn = draw(logits.expand(len(numbers), 4), numbers, temperature=0.5)
    shares = torch.bincount(drawn, minlength=4) / len(numbers)
    torch.testing.assert_close(shares, (logits[0] / 0.5).softmax(-1), rtol=0, atol=1e-4)
    assert draw(logits, torch.tensor([1 - 2**-53], dtype=torch.float64), 1.0) == 3
    assert draw(logits, torch.tensor([0.0], dtype=torch.float64), 1.0) == 0


def plainly(model, prompt, asked, numbers=None):
    """One token after the other, without a cache."""
    written = []
    while len(written) < asked.new_tokens and END not in written:
        logits = model(torch.tensor([[*prompt, *written]]), use_cache=False).logits[0, -1]
        if numbers is None:
            written.append(int(logits.argmax()))
        else:
            cumulated = (logits / asked.temperature).softmax(-1).cumsum(-1)
            written.append(int((cumulated <= numbers[len(written)]).sum()))
    return written


@pytest.mark.parametrize("layout", [None, "hybrid", "kda_only"])
@torch.no_grad()
def test_a_model_writes_what_plain_forwards_say(layout):
    """Greedily and sampled, and as likely as they say; in batches of any size."""
    model = (llama(1, vocab=128) if layout is None else student(layout=layout)).double()
    prompts = [tokens(1, 9, seed=seed)[0].tolist() for seed in range(3)]
    asked = settings(prompt_tokens=9, new_tokens=5, temperature=0.8, seed=3)
    generator = torch.Generator().manual_seed(3)
    numbers = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    greedy = [plainly(model, prompt, asked) for prompt in prompts]
    sampled = [plainly(model, prompt, asked, row) for prompt, row in zip(prompts, numbers, strict=True)]
    likely = []
    for prompt, row in zip(prompts, sampled, strict=True):
        logits = (model(torch.tensor([prompt + row]), use_cache=False).logits[0] / 0.8).log_softmax(-1)
        likely.append(sum(logits[len(prompt) - 1 + index, token].item() for index, token in enumerate(row)))
    for size in (2, 3):
        found = write(model, prompts, asked.model_copy(update={"batch_size": size}), teacher=model)
        assert (found.greedy, found.sampled) == (greedy, sampled)
        assert found.log_probabilities == pytest.approx(likely)


@torch.no_grad()
def test_likelihoods_of_rows_of_unequal_length():
    model = student(layout="hybrid").double()
    contexts = [tokens(1, length, seed=length)[0].tolist() for length in (5, 12, 3, 12)]
    continuations = [tokens(1, length, seed=length)[0].tolist() for length in (7, 1, 20, 2)]
    continuations = [[token % 100 for token in each] for each in continuations]
    expected = []
    for before, after in zip(contexts, continuations, strict=True):
        logits = model(torch.tensor([before + after]), use_cache=False).logits[0, :, :100].log_softmax(-1)
        expected.append(sum(logits[len(before) - 1 + index, token].item() for index, token in enumerate(after)))
    for size in (1, 3, 4):
        found = log_probability(model, contexts, continuations, columns=100, batch_size=size)
        assert found == pytest.approx(expected)


def test_logits_that_are_no_numbers_are_told():
    model = llama(0)
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(UserError, match="the model's logits are not numbers"):
        write(model, [[5, 6]], settings(prompt_tokens=2, new_tokens=2))


def test_prompts_are_beginnings_of_long_documents(tmp_path):
    texts = ["short", *(f"{index} is a number that is longer" for index in range(30)), None]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"words": text}) for text in texts))
    source = {"disk_path": str(tmp_path / "text.jsonl")}
    asked = settings(dataset=source, text_field="words", prompt_tokens=8, samples=20)
    prompts = read_prompts(asked, byte_tokenizer())
    beginnings = [byte_tokenizer().decode(prompt) for prompt in prompts]
    assert len(set(beginnings)) == 20 and all(text in {each[:8] for each in texts if each} for text in beginnings)
    assert read_prompts(asked, byte_tokenizer(), limit=3) == prompts[:3]
    assert read_prompts(asked.model_copy(update={"seed": 1}), byte_tokenizer()) != prompts
    with pytest.raises(UserError, match=r"generation\.prompt_tokens: no document of the text has 2,000 tokens"):
        read_prompts(asked.model_copy(update={"prompt_tokens": 2000}), byte_tokenizer())
    with pytest.raises(
        UserError, match=r"generation\.text_field: the text has no column 'text'; its columns are words"
    ):
        read_prompts(settings(dataset=source), byte_tokenizer())


def test_an_evaluation_of_it(tmp_path, monkeypatch):
    """The teacher beside itself is the same; it writes once for all students; a later student adds what is missing."""
    loads = []
    load = ModelSpec.load
    monkeypatch.setattr(ModelSpec, "load", lambda spec, device: loads.append(spec.name) or load(spec, device))
    save_llama(tmp_path / "teacher", 0)
    save_llama(tmp_path / "far", 1)
    asked = {"dataset": {"disk_path": save_text(tmp_path / "text.jsonl")}, "prompt_tokens": 8, "new_tokens": 12}
    models = {"same": "teacher", "far": "far"}

    def run(names, **changes):
        keys = {
            "output_path": str(tmp_path / "out"),
            "teacher": {"path": str(tmp_path / "teacher")},
            "students": {name: {"path": str(tmp_path / models[name])} for name in names},
            "generation": {**asked, "samples": 6},
            **changes,
        }
        return evaluate(EvaluateConfig.parse(keys))

    first = run(["same"])
    assert first["failures"] == []
    same, teacher = (first["generation"][name]["continuations"] for name in ("same", "teacher"))
    assert (same["agreement"], same["identical"], same["log_probability_difference"]) == (1, 1, 0)
    assert {name: same[name] for name in teacher if name != "standard_errors"} == {
        name: teacher[name] for name in teacher if name != "standard_errors"
    }
    second = run(["same", "far"])
    far = second["generation"]["far"]["continuations"]
    assert second["generation"]["same"]["continuations"] == same
    assert far["agreement"] < 0.5 and far["log_probability_difference"] < 0
    assert loads == ["teacher", "same", "far", "teacher"]
    alone = run(["far"], teacher=None)["generation"]["far"]["continuations"]
    assert alone["greedy"] == far["greedy"] and "agreement" not in alone
    tried = run(["far"], smoke=True)
    assert tried["generation"]["far"]["continuations"]["samples"] == 2
