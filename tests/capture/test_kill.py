"""Killed by SIGKILL at any moment and started again, a capture ends in the files of the one that was not killed."""

import io
import os
import random
import signal
import time
from pydoc_data.topics import topics

import pytest
from rich.console import Console

from distillkit.capture.run import capture
from distillkit.config.capture import CaptureConfig
from distillkit.shards import read_manifest, verify_shards
from tests.capture.captures import files, rows_of
from tests.forks import processes
from tests.training.tiny import BYTES, save_llama

KILLS = 20
SHARDS = 60
TOKENS = 32


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Large enough that a shard takes some 0.1 s of a core: a process must be seen before it is through."""
    return save_llama(tmp_path_factory.mktemp("teacher"), 0, layers=12, hidden_size=512)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """One document of somewhat more than 60 rows, so that a row or a few are left after each kill."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(topics["assignment"][:2000])
    return path


def described(teacher, text, folder):
    return {
        "teacher": {"path": str(teacher)},
        "sequence_length": TOKENS,
        "dataset": {"train_dataset": {"disk_path": str(text)}, "packing": False},
        "compression": {"logprob_compressor": {"d": BYTES, "k": 16, "exact_k": 4, "polynomial_terms": [0, 1, "sqrt"]}},
        "output_path": str(folder),
        "rows_per_shard": 1,
    }


def run(description, share=None):
    capture(CaptureConfig.parse(description), share, Console(file=io.StringIO()))


def started(description, share=None):
    process = processes.Process(target=run, args=(description, share))
    process.start()
    return process


def ended_well(process):
    process.join()
    assert process.exitcode == 0


def wait_until(process, moment):
    while not moment():
        assert process.is_alive(), "the capture ended before it could be killed"
        time.sleep(0.0002)


def kill(process, moment):
    """Kill the process as soon as `moment()` is true."""
    wait_until(process, moment)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def names(folder):
    return os.listdir(folder) if folder.exists() else []


def recorded(folder):
    return sum(name.startswith("shard-") and name.endswith(".json") for name in names(folder))


def unfinished(folder):
    """Files that are being written, or were when their process was killed; named after the process."""
    return {name for name in names(folder) if name.endswith(".unfinished")}


def without_record(folder):
    there = set(names(folder))
    return {name for name in there if name.endswith(".parquet") and f"{name[:-8]}.json" not in there}


def moment(folder, shards, seconds):
    """True after some seconds, or when so many shards are there: a fast machine must be killed before it is done."""
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() >= deadline or recorded(folder) >= shards


@pytest.fixture(scope="module")
def undisturbed(teacher, text, tmp_path_factory):
    """The dataset, and the seconds that one shard takes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "dataset"
    process = started(described(teacher, text, folder))
    wait_until(process, lambda: recorded(folder))
    start = time.monotonic()
    ended_well(process)
    seconds = (time.monotonic() - start) / recorded(folder)
    manifest = read_manifest(folder)
    assert len(manifest.shards) >= SHARDS and verify_shards(folder, manifest) == []
    return folder, seconds


def assert_the_same(folder, undisturbed):
    ours, theirs = files(folder), files(undisturbed)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    assert [row["input_ids"] for row in rows_of(folder)] == [row["input_ids"] for row in rows_of(undisturbed)]


def test_killed_at_twenty_moments(teacher, text, undisturbed, tmp_path):
    """A third of the kills at any time from the start, a third during a shard, a third while a file is written."""
    (whole, seconds), folder, chance = undisturbed, tmp_path / "dataset", random.Random(0)
    inside = between = 0
    for attempt in range(KILLS):
        before, left = recorded(folder), unfinished(folder) | without_record(folder)
        process, more = started(described(teacher, text, folder)), chance.randint(0, 1)
        if attempt % 3 == 0:
            kill(process, moment(folder, before + 1, chance.uniform(0, 1.5)))
        else:
            wait_until(process, lambda so_far=before + more: recorded(folder) >= so_far)
            in_a_shard = moment(folder, before + more + 2, chance.uniform(0, 2 * seconds))
            kill(process, in_a_shard if attempt % 3 == 1 else lambda left=left: unfinished(folder) - left)
        if (unfinished(folder) | without_record(folder)) - left:
            inside += 1
        else:
            between += 1
        assert not (folder / "manifest.json").exists()
    assert inside >= 3 and between >= 3
    assert recorded(folder) < SHARDS
    ended_well(started(described(teacher, text, folder)))
    assert_the_same(folder, whole)


def test_one_of_two_workers_is_killed(teacher, text, undisturbed, tmp_path):
    folder = tmp_path / "dataset"
    description = described(teacher, text, folder)
    survivor, victim = started(description, "1/2"), started(description, "2/2")
    kill(victim, lambda: (folder / "shard-00005.json").exists() and unfinished(folder))
    ended_well(survivor)
    assert not (folder / "manifest.json").exists()
    ended_well(started(description, "2/2"))
    assert_the_same(folder, undisturbed[0])
