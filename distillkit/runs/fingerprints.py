"""Whether files are what they were: by name, size and time of change first, by content where that is cheap.

A fingerprint of at most `CHEAP` bytes is compared by content always. Of more, only the files are read whose time of
change is another, which a copy changes, too.
"""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

CHEAP = 2 * 2**30
"""Bytes that are read in a second, or little more."""

Fingerprint = dict[str, dict[str, Any]]
"""By name: `size` in bytes, `modified` in nanoseconds, and `digest` of the content where it was read; for JSON."""


def files_in(folder: Path) -> dict[str, Path]:
    """The files directly in a folder by their names, but for hidden ones."""
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")}


def fingerprint(files: Mapping[str, Path], limit: int | None = CHEAP) -> Fingerprint:
    """Of files by name. limit: bytes that are read for digests, of the smallest files; None for all."""
    states = {name: path.stat() for name, path in files.items()}
    read, left = [], limit
    for name in sorted(states, key=lambda name: states[name].st_size):
        if left is not None and (left := left - states[name].st_size) < 0:
            break
        read.append(name)
    with ThreadPoolExecutor() as threads:
        digests = dict(zip(read, threads.map(lambda name: digest(files[name]), read), strict=True))
    return {
        name: {"size": state.st_size, "modified": state.st_mtime_ns}
        | ({"digest": digests[name]} if name in digests else {})
        for name, state in states.items()
    }


def differences(files: Mapping[str, Path], then: Fingerprint) -> list[str]:
    """What is not as it was, one phrase per file, such as `a.json has other content`; empty where all is the same.

    A file is taken for the same by size and time where all are more than `CHEAP` bytes, and by size where its content
    was not read then.
    """
    found = [f"{name} is missing" for name in then if name not in files or not files[name].is_file()]
    found += [f"{name} is new" for name in files if name not in then]
    if found:
        return found
    states = {name: path.stat() for name, path in files.items()}
    for name, state in states.items():
        if state.st_size != then[name]["size"]:
            found.append(f"{name} has {state.st_size:,} bytes, not {then[name]['size']:,}")
    if found:
        return found
    cheap = is_cheap(then)
    read = [
        name
        for name, state in states.items()
        if "digest" in then[name] and (cheap or state.st_mtime_ns != then[name]["modified"])
    ]
    with ThreadPoolExecutor() as threads:
        digests = threads.map(lambda name: digest(files[name]), read)
        return [
            f"{name} has other content" for name, now in zip(read, digests, strict=True) if now != then[name]["digest"]
        ]


def is_cheap(then: Fingerprint) -> bool:
    """Whether files are few enough to be read at every start."""
    return sum(state["size"] for state in then.values()) <= CHEAP


def digest(path: Path) -> str:
    """Of a file's content, in hexadecimal; some GB/s. It finds damage, not forgery."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def digest_of(content: bytes) -> str:
    """Of bytes, as that of a file."""
    return xxhash.xxh3_128_hexdigest(content)
