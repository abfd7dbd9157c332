"""Killed by SIGKILL at any moment and resumed, a run ends in the weights of the run that was not killed."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distillkit.config import RunConfig
from distillkit.runs.checkpoints import complete_checkpoints
from distillkit.runs.names import COMPLETE
from distillkit.training.interruption import SAME_SIGNAL_SECONDS, SaveRequests
from tests.forks import processes
from tests.training.test_distill import configuration, run
from tests.training.tiny import save_llama, save_text

TRAINING = {"max_steps": 24, "save_steps": 5, "save_total_limit": 1, "logging_steps": 1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "teacher": save_llama(folder / "teacher", 0, layers=4, hidden_size=48),
        "student": save_llama(folder / "student", 1, attention_dropout=0.1),
        "text": save_text(folder / "train.jsonl"),
        "held_out": save_text(folder / "valid.jsonl", documents=10),
    }


def described(inputs, folder, **changes):
    """A student with half the layers and another width, which learns by pairs and projections."""
    pairs = {"layer_mapping": [[0, 0], [1, 2], [2, 4]], "evaluation": {"num_tokens": 100}}
    return configuration(inputs, folder, TRAINING, **pairs, **changes)


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(described(inputs, folder))
    return folder


def run_described(description):
    run(RunConfig.parse(description))


def killed_when(config, moment):
    """Start the run, kill it as soon as `moment()` is true, and wait for its end."""
    process = processes.Process(target=run_described, args=(config.model_dump(mode="json"),))
    process.start()
    while not moment():
        assert process.is_alive(), "the run ended before it could be killed"
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def logged(folder, lines):
    return lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text().count("\n") >= lines


def assert_ends_as(folder, undisturbed):
    ours, theirs = (load_file(each / "model.safetensors") for each in (folder, undisturbed))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() <= 1e-6, name
    last = "checkpoint-24"
    ours, theirs = (load_file(each / last / "projections.safetensors") for each in (folder, undisturbed))
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-6) for name in theirs)
    steps = [line.split('"step": ')[1].split(",")[0] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [str(step) for step in range(1, 25)]


def test_killed_before_the_first_checkpoint(inputs, tmp_path, undisturbed):
    folder = tmp_path / "run"
    killed_when(described(inputs, folder), logged(folder, 3))
    assert "no checkpoint to resume from" in run(described(inputs, folder, resume=True))
    assert_ends_as(folder, undisturbed)


def test_killed_twice_between_checkpoints(inputs, tmp_path, undisturbed):
    folder = tmp_path / "run"
    killed_when(described(inputs, folder), logged(folder, 8))
    assert complete_checkpoints(folder)
    killed_when(described(inputs, folder, resume=True), logged(folder, 16))
    assert "resuming after step" in run(described(inputs, folder, resume=True))
    assert_ends_as(folder, undisturbed)


def test_killed_while_a_checkpoint_is_written(inputs, tmp_path, undisturbed):
    for attempt in range(10):  # the moment is short; a kill that came too late is tried again
        folder = tmp_path / f"run{attempt}"
        written = folder / "checkpoint-10"
        killed_when(described(inputs, folder), (written / "model.safetensors").exists)
        if not (written / COMPLETE).exists():
            break
    assert not (written / COMPLETE).exists()
    assert [checkpoint.step for checkpoint in complete_checkpoints(folder)] == [5]
    run(described(inputs, folder, resume=True))
    assert_ends_as(folder, undisturbed)


def test_killed_while_the_student_is_saved(inputs, tmp_path, undisturbed):
    folder = tmp_path / "run"
    killed_when(described(inputs, folder), (folder / "config.json").exists)
    assert not (folder / "results.json").exists()
    run(described(inputs, folder, resume=True))
    assert_ends_as(folder, undisturbed)
    results = [Path(each, "results.json").read_text().split('"losses"')[0] for each in (folder, undisturbed)]
    assert results[0].split('"seconds"')[0] == results[1].split('"seconds"')[0]


def wait_for_signals(ready):
    requests = SaveRequests(minutes=None)
    requests.on_train_begin(None, None, None)
    ready.set()
    while True:
        time.sleep(0.01)


def test_a_second_ctrl_c_ends_the_process_at_once():
    ready = processes.Event()
    process = processes.Process(target=wait_for_signals, args=(ready,))
    process.start()
    assert ready.wait(60)
    for pause in (0.1, SAME_SIGNAL_SECONDS):  # the second is torchrun's echo of the first
        os.kill(process.pid, signal.SIGINT)
        time.sleep(pause)
        assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert process.exitcode == 130
