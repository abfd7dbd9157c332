"""Shards: what goes in comes out, whole or not at all, and damage is named."""

import os
import resource
import socket
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from hypothesis import given
from hypothesis import strategies as st

from distillkit.config import UserError
from distillkit.runs.writing import _whole_or_not_at_all, remove_leftovers, sha256, write_whole
from distillkit.shards import (
    Manifest,
    fitted_background,
    read_background,
    read_manifest,
    read_record,
    signal_array,
    signal_table,
    signal_tensor,
    verify,
    verify_shards,
    write_background,
    write_manifest,
    write_shard,
)

DTYPES = [torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32]


def table(rows=6, width=3, seed=0):
    lengths = [1 + (seed + index) % 4 for index in range(rows)]
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(256, (sum(lengths), width), generator=generator).to(torch.uint8)
    input_ids = pa.array([list(range(length)) for length in lengths], pa.list_(pa.int32()))
    return signal_table({"bytes": values}, lengths).append_column("input_ids", input_ids)


def manifest(records, **changes):
    fields = {
        "codec_kind": "plain",
        "codec_config": {"k": 2},
        "tokenizer_sha256": "ab",
        "vocabulary_size": 9,
        "teacher": {"path": "teacher"},
        "capture": {},
        "versions": {"torch": "2"},
        "shards": tuple(records),
        "background": None,
        "packed_to": None,
    }
    return Manifest(**{**fields, **changes})


@pytest.fixture
def dataset(tmp_path):
    records = [write_shard(tmp_path, index, table(seed=index), (6 * index, 6 * index + 6)) for index in range(3)]
    made = manifest(records)
    write_manifest(tmp_path, made)
    return tmp_path, made


@given(lengths=st.lists(st.integers(0, 5), max_size=6), width=st.integers(1, 4), dtype=st.sampled_from(DTYPES))
def test_tensors_come_back(lengths, width, dtype):
    values = torch.arange(sum(lengths) * width).view(-1, width).to(dtype)
    array = signal_array(values, lengths)
    slow, flat = [], iter(values.tolist())
    for length in lengths:
        slow.append([next(flat) for _ in range(length)])
    assert array.to_pylist() == slow
    back = signal_tensor(array)
    assert back.dtype == dtype and torch.equal(back.view(-1), values.view(-1))


def test_slices_chunks_and_other_kinds_of_list():
    values = torch.arange(60, dtype=torch.int64).view(20, 3)
    array = signal_array(values, [5, 5, 5, 5])
    assert torch.equal(signal_tensor(array.slice(1, 2)), values[5:15])
    assert torch.equal(
        signal_tensor(pa.chunked_array([array.slice(2), array.slice(0, 1)])), values[[*range(10, 20), *range(5)]]
    )
    for kind in (pa.large_list(pa.large_list(pa.int64())), pa.list_(pa.list_(pa.int64(), 3))):
        assert torch.equal(signal_tensor(array.cast(kind)), values)
    assert signal_tensor(pa.chunked_array([], array.type)).shape == (0, 0)


@pytest.mark.parametrize(
    ("column", "line"),
    [
        ([[[1, 2], [3]]], "signal: tokens have 1 to 2 values; all must have the same number"),
        ([[[1, None]]], "signal: has missing values"),
        ([[[1], None]], "signal: has missing values"),
        ([None], "signal: must hold a list of numbers per token, but holds null"),
        ([[1, 2]], "signal: must hold a list of numbers per token, but holds "),
        ([[["a"]]], "signal: must hold a list of numbers per token, but holds "),
    ],
)
def test_what_is_no_signal_is_told(column, line):
    with pytest.raises(UserError, match=line):
        signal_tensor(pa.array(column), "signal")


def test_a_shard_is_read_by_others_and_its_bytes_are_the_same_again(tmp_path):
    (tmp_path / "again").mkdir()
    first = write_shard(tmp_path, 3, table(), (0, 6))
    again = write_shard(tmp_path / "again", 3, table(), (0, 6))
    assert first == again == read_record(tmp_path, 3)
    assert sorted(os.listdir(tmp_path / "again")) == ["shard-00003.json", "shard-00003.parquet"]
    assert first.tokens == 13
    assert pq.read_table(tmp_path / first.file).equals(table())
    loaded = load_dataset("parquet", data_files=str(tmp_path / first.file), split="train", cache_dir=tmp_path / "cache")
    assert loaded["bytes"][:] == table()["bytes"].to_pylist()


def test_a_byte_takes_a_byte(tmp_path):
    noise = torch.randint(256, (4000, 100)).to(torch.uint8)
    input_ids = pa.array([[0] * 1000] * 4, pa.list_(pa.int32()))
    rows = signal_table({"bytes": noise}, [1000] * 4).append_column("input_ids", input_ids)
    assert write_shard(tmp_path, 0, rows, (0, 4)).bytes < 1.02 * noise.numel()


def test_only_complete_shards_count(tmp_path):
    for index in (0, 1, 3):
        write_shard(tmp_path, index, table(), (0, 6))
    (tmp_path / "shard-00001.json").unlink()  # killed between the shard and its record
    (tmp_path / "shard-00003.json").write_text('{"file": "sha')
    assert [index for index in range(5) if read_record(tmp_path, index)] == [0]


def test_a_shard_that_has_no_room_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_shard(tmp_path, 0, table(rows=2000), (0, 2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_the_living_stay(tmp_path):
    write_shard(tmp_path, 0, table(), (0, 6))
    here = socket.gethostname().replace(".", "-")
    elsewhere = ".shard-00001.parquet.elsewhere.01234567.unfinished"
    (tmp_path / f".shard-00001.parquet.{here}.01234567.unfinished").write_bytes(b"of a process that was killed")
    (tmp_path / elsewhere).write_bytes(b"of a machine whose locks are not seen here")
    with _whole_or_not_at_all(tmp_path / "shard-00002.parquet") as file:
        file.write(b"half")
        remove_leftovers(tmp_path)
        file.write(b" and half")
    names = [elsewhere, "shard-00000.json", "shard-00000.parquet", "shard-00002.parquet"]
    assert sorted(os.listdir(tmp_path)) == names
    assert (tmp_path / "shard-00002.parquet").read_bytes() == b"half and half"


def test_a_file_written_again_takes_what_a_killed_attempt_left_along(tmp_path):
    here = socket.gethostname().replace(".", "-")
    other = f".README.md.bak.{here}.01234567.unfinished"
    for name in (f".README[1].md.{here}.01234567.unfinished", other):
        (tmp_path / name).write_bytes(b"half")
    write_whole(tmp_path / "README[1].md", b"whole")
    assert sorted(os.listdir(tmp_path)) == [other, "README[1].md"]


def test_two_writers_in_one_process_do_not_meet(tmp_path):
    path = tmp_path / "shard-00002.parquet"
    with _whole_or_not_at_all(path) as first:
        first.write(b"first")
        with _whole_or_not_at_all(path) as second:
            second.write(b"second, longer")
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == [path.name]


def test_a_manifest_comes_back(dataset):
    folder, made = dataset
    assert read_manifest(folder) == made
    assert (made.rows, made.tokens) == (18, sum(record.tokens for record in made.shards))
    assert verify_shards(folder, made) == []
    assert read_manifest(folder / "nothing") is None
    later = (folder / "manifest.json").read_text().replace('"format": 1', '"format": 2')
    (folder / "manifest.json").write_text(later)
    with pytest.raises(UserError, match="has format 2, but this version of distillkit reads format 1"):
        read_manifest(folder)
    (folder / "manifest.json").write_text('{"shards": [{}]}')
    with pytest.raises(UserError, match="is no manifest of a captured dataset"):
        read_manifest(folder)


def test_the_datasets_library_loads_the_folder(dataset):
    folder, made = dataset
    (folder / "plan.json").write_text("{}")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    loaded = load_dataset(str(folder), split="train", cache_dir=folder / "cache")
    assert len(loaded) == made.rows
    assert loaded["bytes"][:] == [row for index in range(3) for row in table(seed=index)["bytes"].to_pylist()]


def test_damage_is_named(dataset):
    folder, made = dataset
    whole = (folder / "shard-00001.parquet").read_bytes()
    (folder / "shard-00000.parquet").unlink()
    (folder / "shard-00001.parquet").write_bytes(whole[:-1])
    flipped = bytearray((folder / "shard-00002.parquet").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (folder / "shard-00002.parquet").write_bytes(flipped)
    (folder / "shard-00007.parquet").write_bytes(whole)
    assert [line.split(" (")[0] for line in verify_shards(folder, made)] == [
        "shard-00000.parquet: is missing",
        f"shard-00001.parquet: is truncated: {len(whole) - 1:,} bytes, {len(whole):,} were captured",
        "shard-00002.parquet: differs from what was captured",
        "shard-00007.parquet: is not in the manifest; it belongs to another dataset",
    ]


def test_shards_are_read_at_the_same_time(dataset, monkeypatch):
    folder, made = dataset
    all_at_once = threading.Barrier(len(made.shards), timeout=20)

    def slow(path):
        all_at_once.wait()
        return sha256(path)

    monkeypatch.setattr(verify, "sha256", slow)
    assert verify_shards(folder, made) == []


def test_a_token_that_was_always_among_the_top_k_may_be_outside_elsewhere():
    background = fitted_background(torch.tensor([3.0, 0.0, 1.0], dtype=torch.float64)).exp()
    torch.testing.assert_close(background, torch.tensor([0.75, 1e-9, 0.25]).double(), rtol=1e-6, atol=0)
    assert torch.isfinite(fitted_background(torch.zeros(3).double())).all()


def test_a_damaged_background_is_named(tmp_path):
    name = write_background(tmp_path, torch.randn(9).log_softmax(-1))
    path = tmp_path / name
    made = manifest([], background=name, background_sha256=sha256(path))
    assert verify_shards(tmp_path, made) == []
    flipped = bytearray(path.read_bytes())
    flipped[-2] ^= 1
    path.write_bytes(flipped)
    assert verify_shards(tmp_path, made) == [f"{name}: differs from what was captured (SHA-256)"]
    path.unlink()
    assert verify_shards(tmp_path, made) == [f"{name}: is missing"]


def test_a_shard_of_another_dataset_is_named(dataset):
    folder, made = dataset
    (folder / "shard-00001.parquet").write_bytes((folder / "shard-00002.parquet").read_bytes())
    assert len(verify_shards(folder, made)) == 1
    lost = manifest([made.shards[0], made.shards[2]])
    assert any("starts at row 12, but the shards before end at 6" in line for line in verify_shards(folder, lost))


def test_a_shard_of_another_capture_is_named(tmp_path):
    plans = ["ab", "cd", "ab"]
    records = [write_shard(tmp_path, index, table(), (6 * index, 6 * index + 6), plans[index]) for index in range(3)]
    line = "shard-00001.parquet: belongs to another capture than shard-00000.parquet"
    assert verify_shards(tmp_path, manifest(records)) == [line]


def test_a_background_comes_back(tmp_path):
    logprobs = torch.randn(9).log_softmax(-1)
    made = manifest([], background=write_background(tmp_path, logprobs))
    assert torch.equal(read_background(tmp_path, made), logprobs)
    assert read_background(tmp_path, manifest([])) is None and read_background(tmp_path, None) is None
    with pytest.raises(UserError, match="covers 9 tokens, but the dataset's vocabulary has 10"):
        read_background(tmp_path, manifest([], background=made.background, vocabulary_size=10))
    (tmp_path / made.background).write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as a background distribution"):
        read_background(tmp_path, made)
