"""Killed by SIGKILL at ten random moments of its life, a run of three phases ends in the weights of an undisturbed one.

The moments are spread over the whole run: by what its folder holds (also between phases, and while the end is put
together) and then some milliseconds that chance decides.
"""

import json
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from distillkit.config import RunConfig
from tests.forks import processes
from tests.training.test_phases import description, run
from tests.training.tiny import save_inputs

pytestmark = pytest.mark.timeout(180)


PHASES = [
    {
        "name": "alignment",
        "frozen_res": ["mlp", "embed_tokens", "norm"],
        "loss_functions": [{"function": "attn_mse", "weight": 1.0}],
        "training_args": {"max_steps": 12},
    },
    {"name": "distillation", "tokens": 2400, "training_args": {"gradient_accumulation_steps": 2}},
    {"name": "long", "sequence_length": 128, "training_args": {"max_steps": 12}},
]
FOLDERS = ["phases/1-alignment", "phases/2-distillation", "phases/3-long"]
TRAINING = {"save_steps": 3, "save_total_limit": 1, "logging_steps": 1, "max_steps": -1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_inputs(tmp_path_factory.mktemp("inputs"))


def described(inputs, folder, resume=True):
    evaluation = {"num_tokens": 50}
    return description(inputs, folder, TRAINING, PHASES, evaluation=evaluation, resume=resume)


def run_described(description):
    run(RunConfig.parse(description))


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    started(described(inputs, folder, resume=False)).join()
    return folder


def started(description):
    process = processes.Process(target=run_described, args=(description,))
    process.start()
    return process


def logged(phase, lines):
    """When a phase has logged so many steps."""

    def moment(folder):
        path = folder / FOLDERS[phase] / "metrics.jsonl"
        return path.exists() and path.read_text().count("\n") >= lines

    return moment


def there(name):
    return lambda folder: (folder / name).exists()


MOMENTS = [
    there("run.json"),
    there("phases/1-alignment/untrained"),
    logged(0, 2),
    logged(0, 8),
    there("phases/1-alignment/model.safetensors"),
    there("phases/1-alignment/results.json"),
    there("phases/2-distillation"),
    logged(1, 5),
    there("phases/3-long/checkpoint-9"),
    there("model.safetensors"),
]
"""Of the life of the run, in its order. A kill comes up to 60 ms later, about as long as a step or a save takes."""


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_killed_at_ten_moments(inputs, undisturbed, tmp_path):
    folder, chance, killed = tmp_path / "run", random.Random(5), 0
    for moment in MOMENTS:
        process = started(described(inputs, folder))
        while process.is_alive() and not moment(folder):
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed == len(MOMENTS)
    process = started(described(inputs, folder))
    process.join()
    assert process.exitcode == 0
    for part in ("", *FOLDERS):
        ours, theirs = (load_file(each / part / "model.safetensors") for each in (folder, undisturbed))
        assert ours.keys() == theirs.keys()
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == [], part
    for part in FOLDERS:
        assert steps(folder / part) == steps(undisturbed / part) == list(range(1, len(steps(folder / part)) + 1))
    ours, theirs = (json.loads((each / "results.json").read_text()) for each in (folder, undisturbed))
    for results in (ours, theirs):
        for phase in results["phases"]:
            del phase["seconds"], phase["losses"]
    assert ours["phases"] == theirs["phases"]
    assert ours["divergence"] == theirs["divergence"]
    unfinished = [path.name for path in folder.rglob(".*") if path.is_file()]
    assert unfinished == []
