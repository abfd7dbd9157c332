"""Phases of two processes: interrupted in the second phase, resumed, and in step with their budget of tokens."""

import json
import os
import signal
import socket
import time

import pytest
from transformers import AutoModelForCausalLM

from distillkit.config import RunConfig
from tests.forks import processes
from tests.training.test_phases import description, run
from tests.training.tiny import save_llama, save_text

pytestmark = pytest.mark.timeout(180)


PHASES = [
    {"name": "one", "training_args": {"bf16": True, "max_steps": 2, "gradient_accumulation_steps": 2}},
    {"name": "two", "tokens": 3000},
]


def run_as(rank, port, description, said):
    """One of two processes that are told of each other, as torchrun starts them."""
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
    said.write_text(run(RunConfig.parse(description)))


def started(description, said):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    both = [processes.Process(target=run_as, args=(rank, port, description, said / rank)) for rank in ("0", "1")]
    for each in both:
        each.start()
    return both


def exit_codes(both):
    for each in both:
        each.join()
    return [each.exitcode for each in both]


def test_phases_of_two_processes(tmp_path):
    inputs = {
        "teacher": save_llama(tmp_path / "teacher", 0),
        "text": save_text(tmp_path / "train.jsonl"),
        "held_out": save_text(tmp_path / "valid.jsonl", documents=10),
    }
    folder = tmp_path / "run"
    described = description(inputs, folder, {"max_steps": -1}, PHASES, resume=True)
    metrics = folder / "phases/2-two/metrics.jsonl"
    both = started(described, tmp_path)
    while all(each.is_alive() for each in both) and not metrics.exists():
        time.sleep(0.01)
    for each in both:
        os.kill(each.pid, signal.SIGINT)
    assert exit_codes(both) == [130, 130]
    assert exit_codes(started(described, tmp_path)) == [0, 0]
    assert "phase 1 of 2: one is finished already" in (tmp_path / "0").read_text()
    assert (tmp_path / "1").read_text() == ""
    schedule = json.loads((folder / "phases/2-two/run.json").read_text())["schedule"]
    results = json.loads((folder / "results.json").read_text())
    assert (results["phases"][1]["steps"], results["phases"][1]["tokens"]) == (schedule["steps"], schedule["tokens"])
    assert abs(schedule["tokens"] - 3000) <= 64 * 4 / 2
    AutoModelForCausalLM.from_pretrained(folder)
