"""Killed by SIGKILL at any moment and started again, a pack ends in the files of the one that was not killed."""

import io
import os
import signal
import time

from rich.console import Console

from distillkit.capture import packing
from tests.capture.test_packing import capture, files
from tests.forks import processes

SHARDS = 60
KILLS = 6


def run(source, out):
    packing.TOKENS_PER_SHARD, packing.ROWS_PER_SHARD = 40, 1
    packing.pack(source, out, 10, Console(file=io.StringIO()))


def started(source, out):
    process = processes.Process(target=run, args=(source, out))
    process.start()
    return process


def names(folder):
    return set(os.listdir(folder)) if folder.exists() else set()


def recorded(folder):
    return sum(name.startswith("shard-") and name.endswith(".json") for name in names(folder))


def unfinished(folder):
    return {name for name in names(folder) if name.endswith(".unfinished")}


def test_killed_at_several_moments(tmp_path):
    """Half of the kills when some shards are there, half while a file is written after that."""
    source = capture(tmp_path / "captured", [[3, 8], [9], [12, 5, 3]] * SHARDS)  # a shard to each three rows
    out, partial = tmp_path / "packed", tmp_path / ".packed.partial"
    undisturbed = started(source, tmp_path / "undisturbed")
    undisturbed.join()
    assert undisturbed.exitcode == 0
    for kill in range(KILLS):
        before, left = recorded(partial), unfinished(partial)
        process = started(source, out)
        while recorded(partial) < before + 2 or (kill % 2 and not unfinished(partial) - left):
            assert process.is_alive(), "the pack ended before it could be killed"
            time.sleep(0.0002)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert not out.exists() and before + 2 <= recorded(partial) < SHARDS
    last = started(source, out)
    last.join()
    assert last.exitcode == 0
    assert files(out) == files(tmp_path / "undisturbed")
    assert not partial.exists()
