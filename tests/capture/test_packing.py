"""Packing: rows of a fixed length in which every token has its signal; a killed run ends as one that was not."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from rich.console import Console

from distillkit.capture import packing
from distillkit.capture.packing import pack
from distillkit.config import DatasetSource, UserError
from distillkit.data.sources import load_source
from distillkit.shards import (
    Manifest,
    read_background,
    read_manifest,
    signal_array,
    verify_shards,
    write_background,
    write_manifest,
    write_shard,
)

QUIET = Console(quiet=True)
ROWS = [[5, 2], [1], [9], [3], [4, 4, 4], [2], [6], [25], [7], [1, 1]]
"""Lengths of the documents in each row."""


def table(rows, first=0, labels=False):
    """Rows whose tokens are numbered through, with two columns of signal that tell the number."""
    counts = [sum(documents) for documents in rows]
    numbers = torch.arange(first, first + sum(counts))
    columns = {
        "input_ids": pa.ListArray.from_arrays(_ends(counts), pa.array(numbers.numpy(), pa.int32())),
        "seq_lengths": pa.array(rows, pa.list_(pa.int32())),
        "packed_ids": signal_array(torch.stack([numbers * 3, numbers * 5], -1), counts),
        "bytes": signal_array(torch.stack([numbers % 256, numbers // 256, numbers % 7], -1).to(torch.uint8), counts),
    }
    if labels:
        columns["labels"] = pa.ListArray.from_arrays(_ends(counts), pa.array((-numbers).numpy(), pa.int32()))
    return pa.table(columns)


def _ends(counts):
    return pa.array([0, *torch.tensor(counts).cumsum(0).tolist()], pa.int32())


def capture(folder, rows=ROWS, rows_per_shard=4, **options):
    """A captured dataset as a capture leaves it."""
    folder.mkdir()
    records, first = [], 0
    for index, start in enumerate(range(0, len(rows), rows_per_shard)):
        chosen = rows[start : start + rows_per_shard]
        record = write_shard(folder, index, table(chosen, first, **options), (start, start + len(chosen)))
        records.append(record)
        first += record.tokens
    background = write_background(folder, torch.full((8,), 0.125).log())
    made = Manifest(
        "plain", {"k": 2}, "ab", 8, {"path": "t"}, {"a": 1}, {"torch": "2"}, tuple(records), background, None
    )
    write_manifest(folder, made)
    return DatasetSource(disk_path=str(folder))


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def documents_of(folder):
    """Documents of all rows, as lists of the tokens' numbers; each token is compared with its signal on the way."""
    found = []
    for row in pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("*.parquet"))).to_pylist():
        assert sum(row["seq_lengths"]) == len(row["input_ids"])
        for number, packed, stored in zip(row["input_ids"], row["packed_ids"], row["bytes"], strict=True):
            assert packed == [number * 3, number * 5]
            assert stored == [number % 256, number // 256, number % 7]
        start = 0
        for length in row["seq_lengths"]:
            found.append(row["input_ids"][start : start + length])
            start += length
    return found


def pieces(rows, sequence_length):
    """What documents must come out: those that went in, or consecutive pieces of them."""
    numbers, first = [], 0
    for length in (length for documents in rows for length in documents):
        document = list(range(first, first + length))
        numbers += [document[start : start + sequence_length] for start in range(0, length, sequence_length)]
        first += length
    return numbers


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(packing, "TOKENS_PER_SHARD", 10)
    monkeypatch.setattr(packing, "ROWS_PER_SHARD", 1)


@pytest.mark.parametrize("sequence_length", [1, 4, 10, 1000])
def test_every_token_keeps_its_signal(tmp_path, small_shards, sequence_length):
    source = capture(tmp_path / "captured", labels=True)
    out = tmp_path / "packed"
    pack(source, out, sequence_length, QUIET)
    assert sorted(documents_of(out)) == pieces(ROWS, sequence_length)
    packed = load_source(DatasetSource(disk_path=str(out / "*.parquet")))
    assert max(len(row["input_ids"]) for row in packed) <= sequence_length
    for row in packed:
        assert row["labels"] == [-number for number in row["input_ids"]]
    before, after = read_manifest(tmp_path / "captured"), read_manifest(out)
    assert after.packed_to == sequence_length
    assert (after.tokens, after.rows) == (before.tokens, len(packed))
    for name in ("codec_kind", "codec_config", "tokenizer_sha256", "teacher", "capture", "versions", "vocabulary_size"):
        assert getattr(after, name) == getattr(before, name)
    assert verify_shards(out, after) == []
    assert read_background(out, after).exp().tolist() == [0.125] * 8


def test_packing_again_to_another_length(tmp_path):
    """A packed dataset is packed by its documents, not by its rows."""
    pack(capture(tmp_path / "captured"), tmp_path / "packed", 25, QUIET)
    pack(DatasetSource(disk_path=str(tmp_path / "packed")), tmp_path / "again", 10, QUIET)
    assert sorted(documents_of(tmp_path / "again")) == pieces(ROWS, 10)


class Killed(Exception):
    pass


@pytest.mark.parametrize("with_record", [True, False])
def test_a_killed_run_ends_as_one_that_was_not(tmp_path, monkeypatch, small_shards, with_record):
    """Killed after each shard, before or after its record is there."""
    source = capture(tmp_path / "captured")
    pack(source, tmp_path / "undisturbed", 10, QUIET)
    kills = 0

    def write_and_die(folder, index, table, rows):
        write_shard(folder, index, table, rows)
        if not with_record:
            (folder / f"shard-{index:05d}.json").unlink()
        raise Killed

    out = tmp_path / "packed"
    while not out.exists():
        monkeypatch.setattr(packing, "write_shard", write_and_die if with_record or kills < 3 else write_shard)
        try:
            pack(source, out, 10, QUIET)
        except Killed:
            kills += 1
    assert kills == (len(list(out.glob("*.parquet"))) if with_record else 3)
    assert files(out) == files(tmp_path / "undisturbed")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    pack(source, out, 10, QUIET)  # finished; nothing happens
    with pytest.raises(UserError, match=r"OUT: .* exists already and holds something else; name a new folder"):
        pack(source, out, 11, QUIET)


def test_what_another_packing_left_is_not_taken_up(tmp_path, monkeypatch, small_shards):
    source, out = capture(tmp_path / "captured"), tmp_path / "packed"

    def write_then_die(folder, index, table, rows):
        if index == 2:
            raise Killed
        return write_shard(folder, index, table, rows)

    monkeypatch.setattr(packing, "write_shard", write_then_die)
    with pytest.raises(Killed):
        pack(source, out, 5, QUIET)
    monkeypatch.setattr(packing, "write_shard", write_shard)
    pack(source, out, 10, QUIET)
    assert sorted(documents_of(out)) == pieces(ROWS, 10)


def test_a_published_dataset_keeps_its_columns(tmp_path):
    """Without a manifest: columns of one list per token go along, others are named; the folder is a dataset again."""
    folder = tmp_path / "published"
    folder.mkdir()
    rows = table([[3], [4], [2]]).drop_columns("seq_lengths").append_column("source", pa.array(["a", "b", "c"]))
    pq.write_table(rows.append_column("turns", pa.array([["x"], ["y", "z"], []])), folder / "train-0.parquet")
    source = DatasetSource(disk_path=str(folder))
    console = Console(file=io.StringIO(), width=200)
    pack(source, tmp_path / "packed", 5, console)
    assert (
        "columns left out, because they do not hold a list of numbers per token: source, turns\n"
        in console.file.getvalue()
    )
    assert sorted(documents_of(tmp_path / "packed")) == pieces([[3], [4], [2]], 5)
    assert read_manifest(tmp_path / "packed") is None
    packed = load_source(DatasetSource(disk_path=str(tmp_path / "packed")))
    assert sorted(packed.column_names) == ["bytes", "input_ids", "packed_ids", "seq_lengths"]
    pack(source, tmp_path / "packed", 5, QUIET)


def test_what_the_last_token_lacks_is_filled_and_padding_goes(tmp_path):
    """Published rows have a word about each token that comes, so one less than tokens, from the first row on or not."""
    rows = {
        "input_ids": [[1, 2, 3], [4, 5], [6]],
        "attention_mask": [[1, 1, 1], [1, 0], [1]],
        "compressed_logprobs": [[[1], [2]], [[4], [5]], []],
        "bytepacked_indices": [[[1], [2], [3]], [[4]], [[6]]],
        "only_in_the_first": [[[1], [2], [3]], [[4]], [[6], [7]]],
    }
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    pack(DatasetSource(disk_path=str(tmp_path / "rows.parquet")), tmp_path / "packed", 5, QUIET)
    (packed,) = load_source(DatasetSource(disk_path=str(tmp_path / "packed")))
    assert packed == {
        "input_ids": [1, 2, 3, 4, 6],
        "seq_lengths": [3, 1, 1],
        "compressed_logprobs": [[1], [2], [0], [4], [0]],
        "bytepacked_indices": [[1], [2], [3], [4], [6]],
    }


@pytest.mark.parametrize("with_manifest", [True, False])
def test_what_is_lost_or_damaged_later_is_made_again(tmp_path, small_shards, with_manifest):
    source, out = capture(tmp_path / "captured"), tmp_path / "packed"
    if not with_manifest:
        for path in [*(tmp_path / "captured").glob("*.json"), tmp_path / "captured" / "background.safetensors"]:
            path.unlink()
    pack(source, out, 10, QUIET)
    whole = files(out)
    for damaged in whole.keys() - {".packed_from.json", "README.md"}:
        (out / damaged).unlink()
        pack(source, out, 10, QUIET)
        assert files(out) == whole
    content = bytearray(whole["shard-00001.parquet"])
    content[len(content) // 2] ^= 1
    (out / "shard-00001.parquet").write_bytes(content)
    console = Console(file=io.StringIO(), width=200)
    pack(source, out, 10, console)
    assert "packed: shard-00001.parquet: missing or damaged, made again" in console.file.getvalue()
    assert files(out) == whole


def test_the_source_is_read_once(tmp_path, monkeypatch, small_shards):
    """Each shard reads the rows that lie behind it, not all those whose documents would fit well."""
    capture(tmp_path / "captured", [[1 + index * 7 % 5, 8 - index * 7 % 5] for index in range(60)])
    read, getitem = [], Dataset.__getitem__

    def counting(rows, key):
        found = getitem(rows, key)
        if "seq_lengths" in rows.column_names and key != slice(None):
            read.append(len(found))
        return found

    monkeypatch.setattr(Dataset, "__getitem__", counting)
    monkeypatch.setattr(packing, "TOKENS_PER_SHARD", 100)
    pack(DatasetSource(disk_path=str(tmp_path / "captured")), tmp_path / "packed", 10, QUIET)
    shards = read_manifest(tmp_path / "packed").shards
    assert len(shards) == 6
    assert 60 <= sum(read) <= 60 + 2 * len(shards)


def test_a_shard_is_bounded_by_its_bytes(tmp_path, monkeypatch):
    """However long the rows: at most 64 rows of a few tokens here, 21 bytes each with offsets and lists."""
    monkeypatch.setattr(packing, "BYTES_PER_SHARD", 2000)
    pack(capture(tmp_path / "captured", [[10]] * 60), tmp_path / "packed", 10, QUIET)
    tokens = [record.tokens for record in read_manifest(tmp_path / "packed").shards]
    assert len(tokens) > 5 and max(tokens) * 27 < 2000


def test_damage_is_named_before_anything_is_written(tmp_path):
    source = capture(tmp_path / "captured")
    shard = tmp_path / "captured" / "shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"captured: shard-00001.parquet: differs from what was captured"):
        pack(source, tmp_path / "packed", 10, QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captured"]


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ({"text": ["a"]}, "DATASET: has no column input_ids; it holds text"),
        ({"input_ids": [[]]}, "DATASET: has only empty rows"),
        (  # a codec's column
            {"input_ids": [[1, 2], [3]], "coeffs": [[[1], [2]], [[3], [4]]]},
            "DATASET: row 1 has 1 input_ids and 2 entries in coeffs; both must have the same number",
        ),
        ({"input_ids": [[1, 2]], "seq_lengths": [[1]]}, "row 0 has 2 tokens, but its seq_lengths add up to 1"),
    ],
)
def test_rows_that_cannot_be_packed_are_told(tmp_path, columns, line):
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=line):
        pack(DatasetSource(disk_path=str(tmp_path / "rows.parquet")), tmp_path / "packed", 10, QUIET)


def test_a_manifest_names_nothing_outside_of_its_folder(tmp_path):
    """Neither does a link: what is packed may be published."""
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "home").mkdir()
    source = capture(tmp_path / "home" / "dataset")
    folder = tmp_path / "home/dataset"
    whole = (folder / "manifest.json").read_text()
    for name in ("../../secret", str(tmp_path / "secret"), ""):
        changed = {**json.loads(whole), "background": name, "background_sha256": None}
        (folder / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=r"manifest\.json: background: "):
            pack(source, tmp_path / "home" / "packed", 4, QUIET)
    (folder / "manifest.json").write_text(whole)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="a link that leads out of its folder; put the file itself there"):
        pack(source, tmp_path / "home" / "packed", 4, QUIET)
    assert not list(tmp_path.rglob("packed/*"))
    assert (tmp_path / "secret").read_text() == "mine"


def test_nothing_outside_of_the_packed_folder_is_deleted(tmp_path):
    source, out = capture(tmp_path / "dataset"), tmp_path / "packed"
    pack(source, out, 4, QUIET)
    (tmp_path / "precious").write_text("mine")
    record = json.loads((out / ".packed_from.json").read_text())
    (out / "link").symlink_to(tmp_path, target_is_directory=True)
    for name in ("../precious", str(tmp_path / "precious"), "link/precious"):
        (out / ".packed_from.json").write_text(json.dumps({**record, "written": {**record["written"], name: "0"}}))
        with pytest.raises(UserError, match=r"\.packed_from\.json: names "):
            pack(source, out, 4, QUIET)
        assert (tmp_path / "precious").read_text() == "mine"
    (out / ".packed_from.json").write_text("[]")
    with pytest.raises(UserError, match=r"\.packed_from\.json: is damaged: it holds no mapping"):
        pack(source, out, 4, QUIET)
    (tmp_path / ".other.partial").mkdir()
    (tmp_path / ".other.partial/precious").write_text("mine")
    with pytest.raises(UserError, match=r"OUT: .*\.other\.partial, where it would be packed first, holds something"):
        pack(source, tmp_path / "other", 4, QUIET)
    assert (tmp_path / ".other.partial/precious").read_text() == "mine"
