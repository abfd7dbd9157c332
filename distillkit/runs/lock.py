"""One process at a time works in a run's folder: it holds a lock, which ends with it, however it ends."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from distillkit.config.errors import UserError
from distillkit.runs.names import LOCK

_held: set[int] = set()
"""Descriptors of locked files. Forked processes close theirs, so that they do not outlive the lock's owner."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made where there is none; also those of other machines, where the
    file system's locks reach them.

    Raises `UserError` where a living process works there, and where nothing can be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _opened(folder / LOCK)
    except BlockingIOError:
        who = "which has just ended"
        with suppress(OSError):
            who = (folder / LOCK).read_text()
        raise UserError(
            "output_path",
            f"another process works in {str(folder)!r} ({who}); wait until it has ended, or choose another output_path",
        ) from None
    except OSError as error:
        raise UserError("output_path", f"nothing can be written into {str(folder)!r}: {error.strerror}") from None
    with file:
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        _held.add(file.fileno())
        try:
            yield
        finally:
            _held.discard(file.fileno())
            (folder / LOCK).unlink(missing_ok=True)


def _opened(path: Path) -> TextIO:
    """The file, empty and locked. Raises BlockingIOError where another process has locked it."""
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        except OSError:  # a file system without locks
            pass
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            return file
        file.close()  # its owner has deleted it in the moment before it was locked


def _let_go() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
