"""A run's folder is of one process at a time, and only while that lives."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from distillkit.config import UserError
from distillkit.runs.lock import locked

fork = multiprocessing.get_context("fork")


def hold(folder, ready):
    with locked(folder):
        ready.set()
        time.sleep(60)


def start(folder):
    ready = fork.Event()
    process = fork.Process(target=hold, args=(folder, ready))
    process.start()
    assert ready.wait(10)
    return process


def test_another_process_is_refused_by_name_until_the_first_is_gone(tmp_path):
    process = start(tmp_path / "run")
    with (
        pytest.raises(
            UserError, match=rf"^output_path: another process works in .* \(process {process.pid} on .* since "
        ),
        locked(tmp_path / "run"),
    ):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with locked(tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_processes_that_the_owner_forked_do_not_keep_it(tmp_path):
    with locked(tmp_path):
        child = fork.Process(target=time.sleep, args=(60,))
        child.start()
        program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with locked(tmp_path):
        assert child.is_alive()
    child.kill()
    child.join()
    program.kill()
    program.wait()


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"^output_path: nothing can be written into '.*/file/run': "),
        locked(tmp_path / "file" / "run"),
    ):
        pass
