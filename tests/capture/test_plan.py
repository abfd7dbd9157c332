"""A folder belongs to one plan, whoever comes first and however many come at once."""

import json

import pytest

from distillkit.capture.plan import Plan, settle_plan
from distillkit.config import UserError
from tests.forks import processes


def plan(**changes):
    fields = {
        "teacher": {"path": "teacher", "weights_sha256": "ef"},
        "codec": {"kind": "plain", "config": {"k": 5}},
        "capture": {"sequence_length": 24},
        "tokenizer_sha256": "ab",
        "vocabulary_size": 9,
        "rows_sha256": "cd",
        "labels": False,
        "background": False,
        "shards": [[0, 1]],
        "tokens": [7],
        "versions": {},
    }
    return Plan(**{**fields, **changes})


def settle(folder, ready, said, ours):
    ready.wait()
    try:
        said.put(settle_plan(folder, ours) == ours)
    except UserError as error:
        said.put(str(error))


def settled_at_once(folder, plans):
    ready, said = processes.Barrier(len(plans)), processes.Queue()
    started = [processes.Process(target=settle, args=(folder, ready, said, ours)) for ours in plans]
    for process in started:
        process.start()
    answers = [said.get(timeout=60) for _ in started]
    for process in started:
        process.join()
    return answers


@pytest.mark.parametrize("attempt", range(5))
def test_all_who_start_in_an_empty_folder_have_the_plan(tmp_path, attempt):
    assert settled_at_once(tmp_path / "dataset", [plan()] * 6) == [True] * 6


def test_of_two_captures_that_start_in_a_folder_one_has_it(tmp_path):
    answers = settled_at_once(tmp_path / "dataset", [plan(), plan(vocabulary_size=10)] * 3)
    assert answers.count(True) == 3
    assert all("its head has" in answer for answer in answers if answer is not True)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "is not the plan of a capture ("),
        ("[1]", "is not the plan of a capture ("),
        ('{"teacher": {}}', "is not the plan of a capture ("),
        (b"\xff", "is not the plan of a capture ("),
        ('{"format": 2, "others": 0}', "has format 2, but this version of distillkit reads format 1; continue with"),
    ],
)
def test_a_plan_that_is_none_is_told(tmp_path, content, line):
    (tmp_path / "plan.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        settle_plan(tmp_path, plan())
    assert str(error.value).startswith(f"output_path: {tmp_path / 'plan.json'} {line}")


def test_the_format_is_written(tmp_path):
    settle_plan(tmp_path, plan())
    assert json.loads((tmp_path / "plan.json").read_text())["format"] == 1
