"""Files that are whole or not there: write under another name, fsync, rename.

Unfinished files have names of their own, so that any number of processes may write into one folder, even the same file.
They are locked meanwhile, so that what a killed process left behind is distinguished from what a living one writes.
"""

import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from distillkit.config.errors import UserError

_CHECKSUM = "checksum"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNFINISHED = ".unfinished"
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK)
"""Errors of a file system that has no hard links, or not between these two places."""


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that a reader sees the old content or the new, never a part, even after a power cut."""
    with _whole_or_not_at_all(path) as file:
        file.write(content)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file for people and programs, whole as `write_whole` does."""
    write_whole(path, (json_text(content, indent=2) + "\n").encode())


def json_text(content: Any, **options: Any) -> str:
    """JSON as the standard has it: numbers that are not finite, such as the perplexity of a broken model, are null.

    options: of `json.dumps`.
    """
    return json.dumps(_finite(content), ensure_ascii=False, allow_nan=False, **options)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty if there is no file. Raises `UserError` for a damaged one."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(path, f"is damaged: it is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(path, "is damaged: it holds no mapping")
    return content


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file with a checksum of its content, so that any damage to it is noticed."""
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)  # as it is read again
    write_json(path, {**content, _CHECKSUM: _checksum(content)})


def read_sealed(path: Path) -> dict[str, Any]:
    """The mapping in a file of `write_sealed`, without the checksum; empty if there is no file.

    Those of earlier versions have none, but a configuration. Raises `UserError` for a damaged file.
    """
    content = read_json(path)
    checksum = content.pop(_CHECKSUM, None)
    config = content.get("config")
    whole = checksum == _checksum(content) if checksum else isinstance(config, dict) and bool(config)
    if path.exists() and not whole:
        raise UserError(
            path, f"is damaged, or was changed by hand (then remove the line {_CHECKSUM!r} from it); restore it"
        )
    return content


def write_first(path: Path, content: bytes) -> None:
    """Write a file whole, unless there is one: of processes that do so at the same time, one has its way."""
    with suppress(FileExistsError), _whole_or_not_at_all(path, _publish_first) as file:
        file.write(content)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Delete the unfinished files of this machine that nobody writes any more: of one file, or of a whole folder.

    Locks do not reach other machines on every file system, so what those write is left alone.
    """
    for path in folder.glob(f".{name}.{_host()}.*{_UNFINISHED}"):
        # A file that is gone was finished meanwhile; one that cannot be locked is being written.
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed because the disk is full; safetensors and torch raise errors without an errno."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _NO_ROOM
    text = str(error)
    return any(f"(os error {number})" in text for number in _NO_ROOM) or (
        isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "inline_container" in text)
    )


@contextmanager
def full_disk_errors(problem: Callable[[], str]) -> Iterator[None]:
    """Within it, a write that fails because the disk is full is a `UserError` of `output_path`."""
    try:
        yield
    except Exception as error:
        if not is_full_disk(error):
            raise
        raise UserError("output_path", f"the disk is full {problem()}") from error


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until what was written to a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hard_link(source: Path, path: Path) -> bool:
    """Make `path` a second name of a file; False where the file system cannot. Raises FileExistsError."""
    try:
        os.link(source, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return False
    return True


def _checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())


def _publish_first(staged: Path, path: Path) -> None:
    if not hard_link(staged, path):
        os.replace(staged, path)


@contextmanager
def _whole_or_not_at_all(path: Path, publish: Callable[[Path, Path], object] = os.replace) -> Iterator[BinaryIO]:
    """A file that becomes `path` when the block ends, and is gone when it does not end well.

    What a killed process left of the same file goes, too.
    """
    remove_leftovers(path.parent, glob.escape(path.name))
    staged = path.with_name(f".{path.name}.{_host()}.{secrets.token_hex(4)}{_UNFINISHED}")
    try:
        with _locked(staged) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            publish(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    flush(path.parent)  # so that the rename is on disk too


def _locked(path: Path) -> BinaryIO:
    """A new file with a lock on it, which ends with the process, however that ends."""
    while True:
        file = path.open("xb")
        with suppress(OSError):  # a file system without locks: there leftovers stay
            fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():
            return file
        file.close()  # taken for a leftover in the moment before it was locked


def _host() -> str:
    return socket.gethostname().replace(".", "-")
