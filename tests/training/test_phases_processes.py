"""Phases of two processes: interrupted in the second phase, resumed, and in step with their budget of tokens."""

import json
import os
import signal
import time

import pytest
from transformers import AutoModelForCausalLM

from distillkit.config import RunConfig
from tests.forks import environments, exit_codes, started
from tests.training.test_phases import description, run
from tests.training.tiny import save_llama, save_text

pytestmark = pytest.mark.timeout(180)

PHASES = [
    {"name": "one", "training_args": {"bf16": True, "max_steps": 2, "gradient_accumulation_steps": 2}},
    {"name": "two", "tokens": 3000},
]


def run_as(environment, description, folder):
    """One of two processes that know of each other, as torchrun starts them."""
    os.environ |= environment
    (folder / environment["RANK"]).write_text(run(RunConfig.parse(description)))


def both(description, folder):
    return started(run_as, [(each, description, folder) for each in environments()])


def test_phases_of_two_processes(tmp_path):
    inputs = {
        "teacher": save_llama(tmp_path / "teacher", 0),
        "text": save_text(tmp_path / "train.jsonl"),
        "held_out": save_text(tmp_path / "valid.jsonl", documents=10),
    }
    folder = tmp_path / "run"
    described = description(inputs, folder, {"max_steps": -1}, PHASES, resume=True)
    metrics = folder / "phases/2-two/metrics.jsonl"
    two = both(described, tmp_path)
    while all(each.is_alive() for each in two) and not metrics.exists():
        time.sleep(0.01)
    for each in two:
        os.kill(each.pid, signal.SIGINT)
    assert exit_codes(two, 60) == [130, 130]
    assert exit_codes(both(described, tmp_path), 60) == [0, 0]
    assert "phase 1 of 2: one is finished already" in (tmp_path / "0").read_text()
    assert (tmp_path / "1").read_text() == ""
    schedule = json.loads((folder / "phases/2-two/run.json").read_text())["schedule"]
    results = json.loads((folder / "results.json").read_text())
    assert (results["phases"][1]["steps"], results["phases"][1]["tokens"]) == (schedule["steps"], schedule["tokens"])
    assert abs(schedule["tokens"] - 3000) <= 64 * 4 / 2
    AutoModelForCausalLM.from_pretrained(folder)
