"""A disk that is full ends a capture with one line; with room again, the same command goes on."""

import os
import subprocess

import pytest

from distillkit.config import UserError
from tests.capture.captures import configuration, files, run
from tests.training.tiny import save_llama, save_text


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(words, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no file system can be mounted here; needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk, tmp_path):
    teacher, text = save_llama(tmp_path / "teacher", 0), save_text(tmp_path / "text.jsonl")
    run(configuration(teacher, text, tmp_path / "whole", rows_per_shard=4))
    folder = small_disk / "dataset"
    dataset = {"train_dataset": {"disk_path": text}, "prepared_dataset_path": str(tmp_path / "prepared")}
    config = configuration(teacher, text, folder, rows_per_shard=4, dataset=dataset)
    for _ in range(2):  # and it is still full
        with pytest.raises(UserError) as error:
            run(config)
        line = str(error.value)
        assert line.startswith(f"output_path: the disk is full at '{folder}': ")
        assert line.endswith("shards are complete; free some space, and run the same command again for the others")
        assert not [name for name in os.listdir(folder) if name.endswith(".unfinished")]
    assert " 0 of " not in line and not (folder / "manifest.json").exists()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert "are complete already" in run(config)
    assert files(folder) == files(tmp_path / "whole")


def test_a_disk_without_room_for_the_prepared_rows(small_disk, tmp_path):
    teacher, text = save_llama(tmp_path / "teacher", 0), save_text(tmp_path / "text.jsonl")
    (small_disk / "other").write_bytes(bytes(56 * 2**10))
    with pytest.raises(
        UserError,
        match=r"^output_path: the disk is full beside .*, where the prepared rows are written; free some space",
    ):
        run(configuration(teacher, text, small_disk / "dataset"))
