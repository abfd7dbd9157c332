"""Files are known by name and size, by content where that is cheap, and else by the time of their change."""

import os

import pytest

from distillkit.runs import fingerprints
from distillkit.runs.fingerprints import differences, files_in, fingerprint


@pytest.fixture
def folder(tmp_path):
    for name, content in {"a": b"1234", "b": b"123456789", ".hidden": b""}.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def change(path, content):
    """Other content with the same time of change."""
    times = os.stat(path)
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_what_differs_is_named(folder):
    then = fingerprint(files_in(folder))
    assert then.keys() == {"a", "b"}
    os.utime(folder / "a")
    assert differences(files_in(folder), then) == []
    change(folder / "a", b"1235")
    assert differences(files_in(folder), then) == ["a has other content"]
    (folder / "a").write_bytes(b"12345")
    assert differences(files_in(folder), then) == ["a has 5 bytes, not 4"]
    (folder / "a").rename(folder / "c")
    assert differences(files_in(folder), then) == ["a is missing", "c is new"]


def test_of_much_only_files_with_other_times_are_read(folder, monkeypatch):
    then = fingerprint(files_in(folder), limit=None)
    monkeypatch.setattr(fingerprints, "CHEAP", 5)
    change(folder / "a", b"1235")
    assert differences(files_in(folder), then) == []
    os.utime(folder / "a")
    assert differences(files_in(folder), then) == ["a has other content"]


def test_only_the_smallest_files_are_read_for_digests(folder):
    then = fingerprint(files_in(folder), limit=5)
    assert {name for name, state in then.items() if "digest" in state} == {"a"}
    (folder / "b").write_bytes(b"987654321")
    assert differences(files_in(folder), then) == []
