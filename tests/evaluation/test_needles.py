"""Who copies the needle scores everything, who does not see it nothing; real models are asked as they would be."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from distillkit.config.errors import UserError
from distillkit.config.evaluate import NeedlesConfig
from distillkit.evaluation.haystack import TASKS
from distillkit.evaluation.needles import measure_needles

from ..smollm2 import needs_smollm2, smollm2_tokenizer
from ..training.tiny import BYTES, llama
from ..training.tiny import tokenizer as byte_tokenizer


class Oracle(PreTrainedModel, GenerationMixin):
    """Reads the text of its tokens and writes what stands beside the keys in the question, row by row.

    Its cache is the tokens so far, so it sees a prompt that comes in pieces as any other model does; what the mask
    tells it to leave out it has not seen.
    """

    config_class = LlamaConfig

    def __init__(self, tokenizer, answer):
        super().__init__(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id))
        self.weight = nn.Parameter(torch.zeros(1))
        self.tokenizer, self.answer = tokenizer, answer
        self.pieces, self.masks = [], []

    def forward(self, input_ids, past_key_values, use_cache, logits_to_keep, attention_mask=None, position_ids=None):
        assert use_cache and logits_to_keep == 1
        self.pieces.append(tuple(input_ids.shape))
        self.masks.append(attention_mask)
        rows = past_key_values or [SimpleNamespace(tokens=[], answer=None) for _ in input_ids]
        logits = torch.zeros(len(rows), 1, self.config.vocab_size)
        for index, row in enumerate(rows):
            tokens = input_ids[index]
            if attention_mask is not None:
                real = attention_mask[index, -len(tokens) :].bool()
                tokens, positions = tokens[real], position_ids[index, real].tolist()
                assert positions == list(range(len(row.tokens), len(row.tokens) + len(positions)))
            row.tokens += tokens.tolist()
            logits[index, 0, self._next(row)] = 1.0
        return CausalLMOutputWithPast(logits=logits, past_key_values=rows)

    def _next(self, row):
        text = self.tokenizer.decode(row.tokens[-200:])
        if row.answer is None and re.search(r"mentioned in the provided text (is|are)$", text):
            written = self.tokenizer(self.answer(self.tokenizer.decode(row.tokens)), add_special_tokens=False)
            row.answer = iter(written["input_ids"])
        return 0 if row.answer is None else next(row.answer, self.tokenizer.eos_token_id)


def asked(text):
    keys = re.search(r"The special magic \w+ for (.*?) mentioned in the provided text (is|are)$", text).group(1)
    return re.split(r", and |, ", keys)


def copy_needles(text):
    found = [re.findall(rf"for {re.escape(key)} is: (\S+)\.", text) for key in asked(text)]
    return " " + ", ".join(value.upper() for values in found for value in values) + "."


def see_nothing(text):
    """The haystack and its distractors are read, the needles that are asked for are not."""
    others = [value for key, value in re.findall(r"for (\S+) is: (\S+)\.", text) if key not in asked(text)]
    return " " + ", ".join(others[:2] or ["1234567"])


def settings(tmp_path, **changes):
    path = tmp_path / "prose.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"This is page {i}. It says no more than that."}) for i in range(99)))
    values = {"lengths": [1024], "depths": 5, "samples": 1, "haystack": {"disk_path": str(path)}, **changes}
    return NeedlesConfig.parse(values)


@needs_smollm2
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("answer", "share", "lengths"), [(copy_needles, 1, [512, 1024, 4096, 16384]), (see_nothing, 0, [512, 4096])]
)
def test_oracles_score_all_and_nothing(task, answer, share, lengths, tmp_path):
    tokenizer = smollm2_tokenizer()
    oracle = Oracle(tokenizer, answer)
    rows = measure_needles(oracle, tokenizer, settings(tmp_path, lengths=lengths), task)
    assert [(row["length"], row["depth"]) for row in rows] == [
        (length, depth) for length in lengths for depth in (0, 0.25, 0.5, 0.75, 1)
    ]
    assert all(row["correct"] == share and row["total"] == 1 for row in rows)
    assert all(0.98 * row["length"] <= row["prompt_tokens_mean"] <= row["length"] for row in rows)


@needs_smollm2
@pytest.mark.parametrize("task", ["niah_multivalue", "niah_multiquery"])
def test_half_of_the_values_is_half_a_score(task, tmp_path):
    oracle = Oracle(smollm2_tokenizer(), lambda text: ",".join(copy_needles(text).split(",")[:2]))
    rows = measure_needles(oracle, smollm2_tokenizer(), settings(tmp_path), task)
    assert [row["correct"] for row in rows] == [0.5] * 5


@needs_smollm2
def test_the_prompt_comes_in_pieces_and_the_answer_ends_with_the_last_value(tmp_path):
    tokenizer = smollm2_tokenizer()
    oracle = Oracle(tokenizer, lambda text: copy_needles(text) + " and so on" * 50)
    (row,) = measure_needles(oracle, tokenizer, settings(tmp_path, depths=1, prefill_tokens=300), "niah_single_1")
    assert row["depth"] == 0.5 and row["correct"] == 1
    prompt = int(row["prompt_tokens_mean"])
    assert oracle.pieces[:4] == [(1, 300), (1, 300), (1, 300), (1, prompt - 900)]
    assert set(oracle.pieces[4:]) == {(1, 1)} and len(oracle.pieces) < 4 + 16


@needs_smollm2
def test_an_answer_ends_after_128_tokens(tmp_path):
    oracle = Oracle(smollm2_tokenizer(), lambda text: " and so on" * 100 + copy_needles(text))
    (row,) = measure_needles(oracle, smollm2_tokenizer(), settings(tmp_path, depths=1), "niah_single_1")
    assert row["correct"] == 0
    assert oracle.pieces.count((1, 1)) == 127  # the first token is the prompt's


def some(text):
    """Answers of unequal length: all values, half of them, none; then the end, then what does not count."""
    values = copy_needles(text)
    kind = sum(map(ord, values)) % 3
    return [values, values.split(", ")[0] + "</s>" + values, "I do not know." + "</s>" + values][kind]


@pytest.mark.parametrize("task", ["niah_multivalue", "niah_single_2"])
def test_prompts_are_answered_together_as_they_are_alone(task, tmp_path):
    """In a tokenizer of bytes prompts are of unequal length; what is padded is no part of them."""
    asked = settings(tmp_path, lengths=[1200, 1500], depths=3, samples=3, prefill_tokens=2000)
    rows = {}
    for size in (1, 4):
        oracle = Oracle(byte_tokenizer(), some)
        rows[size] = measure_needles(oracle, byte_tokenizer(), asked.model_copy(update={"batch_size": size}), task)
    assert rows[4] == rows[1]
    assert len({row["correct"] for row in rows[1]}) > 1
    assert {shape[0] for shape in oracle.pieces} == {4, 1}  # nine of a length
    assert max(tokens for together, tokens in oracle.pieces if together == 4) == 500  # 2,000 of all four
    assert any(mask is not None for mask in oracle.masks)


def give_another(text):
    """The value of another key than the one that is asked for; and for every other prompt the right one behind it."""
    (key,) = asked(text)
    value = next(value for other, value in re.findall(r"for (\S+) is: (\S+)\.", text) if other != key)
    return f" {value}." + (copy_needles(text) if int(value) % 2 else "")


def test_an_answer_for_another_key_is_told(tmp_path):
    asked_for = settings(tmp_path, lengths=[2400], samples=4, prefill_tokens=10_000)
    oracle = Oracle(byte_tokenizer(), give_another)
    rows = measure_needles(oracle, byte_tokenizer(), asked_for, "niah_multikey_similar")
    assert all(row["mistaken"] + row["correct"] == row["total"] for row in rows)
    assert 0 < sum(row["mistaken"] for row in rows) < 20


def test_a_model_that_runs_is_measured(tmp_path):
    """A Llama of random weights finds nothing, within its budget and in the given number of samples."""
    told = []
    rows = measure_needles(
        llama(0, vocab=BYTES),
        byte_tokenizer(),
        settings(tmp_path, lengths=[800, 1000], depths=2, samples=2, prefill_tokens=256),
        "niah_single_1",
        limit=1,
        progress=lambda done, total: told.append((done, total)),
    )
    assert [(row["correct"], row["total"]) for row in rows] == [(0, 1)] * 4
    assert told == [(1600, 3600), (3600, 3600)]  # both depths of a length at a time


def test_a_haystack_without_text_is_told(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"story": "once"}')
    wrong = settings(tmp_path, haystack={"disk_path": str(tmp_path / "rows.jsonl")})
    with pytest.raises(UserError, match=r"needles\.haystack: has no column text, .*; its columns are story"):
        measure_needles(llama(0), byte_tokenizer(), wrong, "niah_single_2")
    gone = settings(tmp_path, haystack={"disk_path": str(tmp_path / "nothing.jsonl")})
    with pytest.raises(UserError, match=r"needles\.haystack\.disk_path: cannot read"):
        measure_needles(llama(0), byte_tokenizer(), gone, "niah_single_2")
