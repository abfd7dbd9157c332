"""One process at a time works in a run's folder: it holds a lock, which ends with it, however it ends."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
        file = (folder / LOCK).open("a+")
    except OSError as error:
        raise UserError("output_path", f"nothing can be written into {str(folder)!r}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                "output_path",
                f"another process works in {str(folder)!r} ({file.read(200).strip()}); wait until it has ended, or "
                "choose another output_path",
            ) from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        _held.add(file.fileno())
        try:
            yield
        finally:
            _held.discard(file.fileno())


def _let_go() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
