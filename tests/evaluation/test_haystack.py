"""Prompts are as long as they say, their needles lie where they say, and nothing in them is there twice by chance."""

import re
from pydoc_data.topics import topics

import pytest

from distillkit.config.errors import UserError
from distillkit.config.evaluate import ESSAY_TASKS
from distillkit.evaluation.haystack import TASKS, Essay, build_prompt

from ..smollm2 import needs_smollm2, smollm2_tokenizer

pytestmark = needs_smollm2
ESSAY = Essay(" ".join(topics[name] for name in sorted(topics)))
SHORT_ESSAY = Essay("All of this text. It is short! Is it not?")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SENTENCE = re.compile(r"One of the special magic (number|uuid)s for (\S+) is: (\S+)\.")


def prompt(task, length=1024, depth=0.5, seed="0", essay=ESSAY):
    return build_prompt(TASKS[task], smollm2_tokenizer(), length, depth, seed, essay)


def context(text):
    return text.split("afterwards.\n", 1)[1].rpartition("\nWhat ")[0]


def test_tasks_are_those_of_the_configuration():
    assert {name for name, task in TASKS.items() if task.haystack == "essay"} == set(ESSAY_TASKS)


@pytest.mark.parametrize("length", [512, 1024, 4096])
@pytest.mark.parametrize("task", TASKS)
def test_the_prompt_has_the_nominal_length(task, length):
    for depth in DEPTHS:
        made = prompt(task, length, depth)
        assert 0.98 * length <= len(made.token_ids) <= length
        assert made.token_ids == smollm2_tokenizer()(made.text)["input_ids"]


@pytest.mark.parametrize("task", TASKS)
def test_the_needle_lies_at_its_depth(task):
    for depth in DEPTHS:
        text = context(prompt(task, 4096, depth).text)
        needle = prompt(task, 4096, depth).needle
        before = smollm2_tokenizer()(text[: text.index(needle)])["input_ids"]
        whole = smollm2_tokenizer()(text.replace(needle, "", 1))["input_ids"]
        assert abs(len(before) / len(whole) - depth) < 0.03
        assert text.startswith(needle) == (depth == 0)
        assert text.endswith(needle) == (depth == 1)


@pytest.mark.parametrize("task", TASKS)
def test_keys_and_values_are_there_once(task):
    for seed in range(5):
        made = prompt(task, 2048, seed=str(seed))
        found = SENTENCE.findall(context(made.text))
        values = [value for _, _, value in found]
        assert len(set(values)) == len(values)
        assert all(made.text.count(value) == 1 for value in values)
        given = {value: key for _, key, value in found}
        asked = {given[value] for value in made.wanted}
        assert sorted(value for value, key in given.items() if key in asked) == sorted(made.wanted)
        keys_of_values = [key for _, key, _ in found]
        assert len(set(keys_of_values)) == len(keys_of_values) - (TASKS[task].values - 1)
        question = made.text.rpartition("\nWhat ")[2]
        assert all(question.count(f" {key}") == 2 for key in asked)


@pytest.mark.parametrize(
    ("task", "needles", "wanted"),
    [
        ("niah_single_1", 1, 1),
        ("niah_single_2", 1, 1),
        ("niah_single_3", 1, 1),
        ("niah_multikey_1", 4, 1),
        ("niah_multivalue", 4, 4),
        ("niah_multiquery", 4, 4),
    ],
)
def test_each_task_has_its_number_of_needles(task, needles, wanted):
    made = prompt(task)
    assert (len(SENTENCE.findall(made.text)), len(made.wanted)) == (needles, wanted)


def test_similar_keys_have_one_word_in_common_with_the_one_asked_for():
    made = prompt("niah_multikey_similar", 2048)
    keys = {value: key for _, key, value in SENTENCE.findall(context(made.text))}
    asked = keys[made.wanted[0]].split("-")
    others = [keys[value].split("-") for value in made.others]
    assert len(others) == 7 and set(keys) == {*made.wanted, *made.others}
    assert all([a == b for a, b in zip(asked, other, strict=True)].count(True) == 1 for other in others)
    assert {other[0] == asked[0] for other in others} == {True, False}


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_a_haystack_of_needles_is_filled_with_less_than_another(task):
    text = context(prompt(task, 4096).text)
    noise = SENTENCE.sub("", text).strip()
    assert len(smollm2_tokenizer()(noise)["input_ids"]) < 60


def test_prompts_are_worded_as_rulers():
    """Those of arXiv 2404.06654: scores can be compared only where questions are the same."""
    one, several = prompt("niah_single_1"), prompt("niah_multiquery", essay=SHORT_ESSAY)
    key = SENTENCE.search(one.text).group(2)
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    assert one.text.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        f"the number afterwards.\n{noise}"
    )
    assert one.text.endswith(
        f"\nWhat is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is"
    )
    assert several.text.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the numbers afterwards.\n"
    )
    assert re.search(
        r"\nWhat are all the special magic numbers for (\S+, \S+, \S+, and \S+) mentioned in the provided text\? "
        r"The special magic numbers for \1 mentioned in the provided text are$",
        several.text,
    )


def test_the_same_seed_gives_the_same_prompt():
    for task in TASKS:
        assert prompt(task) == prompt(task)
        assert prompt(task).text != prompt(task, seed="1").text


def test_a_short_essay_is_repeated():
    text = context(prompt("niah_single_2", essay=SHORT_ESSAY).text)
    assert text.count("All of this text. It is short! Is it not?") > 50


def test_a_table_without_sentences_has_every_depth():
    table = Essay("one two three four five six seven " * 2000)
    for depth in DEPTHS:
        made = prompt("niah_single_2", 4096, depth, essay=table)
        text = context(made.text)
        assert abs(text.index(made.needle) / (len(text) - len(made.needle)) - depth) < 0.02


def test_mistakes_are_told():
    with pytest.raises(UserError, match=r"needles\.haystack: is missing"):
        prompt("niah_single_2", essay=None)
    with pytest.raises(UserError, match=r"needles\.haystack: is missing"):
        prompt("niah_single_2", essay=Essay("  "))
    with pytest.raises(
        UserError, match=r"needles\.lengths: 64 tokens are too few; needles and question alone have \d+"
    ):
        prompt("niah_multiquery", 64)
