"""A budget in tokens is met to within half a step, and what is planned is what is read."""

import itertools
import json
import random
import shutil

import pytest

from distillkit.config import UserError
from distillkit.training.budget import steps_of_budget
from tests.training.test_distill import configuration, run
from tests.training.tiny import save_llama, save_text


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "teacher": save_llama(folder / "teacher", 0),
        "student": save_llama(folder / "student", 1),
        "text": save_text(folder / "train.jsonl"),
        "held_out": save_text(folder / "valid.jsonl", documents=10),
    }


def with_budget(inputs, folder, tokens, training=None, packing=True, **changes):
    dataset = {"train_dataset": {"disk_path": inputs["text"]}, "packing": packing}
    training = {"max_steps": -1, **(training or {})}
    return configuration(inputs, folder, training, dataset=dataset, evaluation=None, tokens=tokens, **changes)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_steps_that_come_closest():
    """Against the distances of all numbers of steps."""
    chance = random.Random(0)
    for _ in range(200):
        steps = [chance.randint(1, 30) for _ in range(40)]
        budget = chance.randint(1, 400)
        read = [0, *itertools.accumulate(steps)]
        best = min(range(1, 41), key=lambda count: abs(read[count] - budget))
        count, tokens = steps_of_budget(iter(steps), budget)
        assert (count, tokens) == (best, read[best])


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("packing", [True, False])
def test_the_last_step_is_the_closest_to_the_budget(inputs, tmp_path, packing, accumulated):
    """Several times through rows of unequal length, whose last step of each time is shorter."""
    training = {"gradient_accumulation_steps": accumulated, "logging_steps": 1, "per_device_train_batch_size": 4}
    said = run(with_budget(inputs, tmp_path / "run", 7000, training, packing))
    read = [line["tokens"] for line in lines_of(tmp_path / "run")]
    steps = [after - before for before, after in zip([0, *read], read, strict=False)]
    assert abs(read[-1] - 7000) <= max(steps) / 2
    assert len(set(steps)) > 1
    schedule = json.loads((tmp_path / "run/run.json").read_text())["schedule"]
    assert (schedule["steps"], schedule["tokens"]) == (len(steps), read[-1])
    assert schedule["times"] > 1.5
    assert f"training ({len(steps)} steps, " in said
    assert f"{schedule['times']:.3g} times through the data)" in said


def test_a_resumed_run_has_the_steps_that_it_began_with(inputs, tmp_path):
    folder, training = tmp_path / "run", {"save_steps": 4, "logging_steps": 1, "save_total_limit": 10}
    run(with_budget(inputs, folder, 3000, training))
    lines = lines_of(folder)
    (folder / "results.json").unlink()
    for path in folder.glob("checkpoint-*"):
        if path.name != "checkpoint-4":
            shutil.rmtree(path)
    assert "resuming after step 4" in run(with_budget(inputs, folder, 3000, training, resume=True))
    assert len(lines) > 6
    assert [(line["step"], line["tokens"], line["loss"], line["learning_rate"]) for line in lines_of(folder)] == [
        (line["step"], line["tokens"], line["loss"], line["learning_rate"]) for line in lines
    ]


def test_less_than_a_step_is_one_step_and_said(inputs, tmp_path):
    said = run(with_budget(inputs, tmp_path / "run", 5))
    assert "tokens: 5 are less than one step of " in said
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [1]


def test_epochs_and_steps_are_told_in_tokens_too(inputs, tmp_path):
    config = configuration(inputs, tmp_path / "run", {"max_steps": -1, "num_train_epochs": 1.5}, evaluation=None)
    said = run(config)
    last = lines_of(tmp_path / "run")[-1]
    schedule = json.loads((tmp_path / "run/run.json").read_text())["schedule"]
    assert (schedule["steps"], schedule["tokens"]) == (last["step"], last["tokens"])
    assert f"training ({last['step']} steps, " in said


@pytest.mark.parametrize("budget", [{"max_steps": 2}, {"num_train_epochs": 1}])
def test_fewer_rows_than_a_batch_are_no_endless_run(inputs, tmp_path, budget):
    training = {"max_steps": -1, **budget, "dataloader_drop_last": True, "per_device_train_batch_size": 4096}
    with pytest.raises(UserError, match=r"training_args\.dataloader_drop_last: leaves no batch of the \d+ rows"):
        run(configuration(inputs, tmp_path / "run", training, evaluation=None))
