import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from distillkit.config.data import DatasetSource
from distillkit.config.errors import UserError
from distillkit.data.sources import load_source

TEXTS = ["first", "second\n\nwith a blank line", "third"]


def write_jsonl(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def load(path: Path | str, split: str | None = None) -> list[str]:
    return load_source(DatasetSource(disk_path=str(path), split=split))["text"][:]


def error(path: Path | str, split: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_source(DatasetSource(disk_path=str(path), split=split), "dataset.train_dataset")
    return str(caught.value)


def test_file_kinds_give_the_same_rows(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl")
    (tmp_path / "rows.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.json", "rows.parquet"):
        assert load(tmp_path / name) == TEXTS
        assert load(tmp_path / name, "train[1:]") == TEXTS[1:]


def test_a_text_file_is_one_document(tmp_path):
    for name, text in zip("abc", TEXTS, strict=True):
        (tmp_path / f"{name}.txt").write_text(text)
    assert load(tmp_path / "b.txt") == [TEXTS[1]]
    assert load(tmp_path) == TEXTS
    assert load(tmp_path / "[ab].txt") == TEXTS[:2]


def test_saved_datasets(tmp_path):
    rows = Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "held_out": rows.select([2])}).save_to_disk(tmp_path / "two")
    assert load(tmp_path / "one") == TEXTS
    assert load(tmp_path / "one", "train") == TEXTS
    assert load(tmp_path / "two", "held_out") == TEXTS[2:]
    assert load(tmp_path / "two", "train[:1]+held_out") == [TEXTS[0], TEXTS[2]]


def test_folder_and_pattern(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", TEXTS[:2])
    write_jsonl(tmp_path / "test.jsonl", TEXTS[2:])
    (tmp_path / "README.md").write_text("notes")
    assert load(tmp_path, "train") == TEXTS[:2]
    assert load(tmp_path, "test") == TEXTS[2:]
    assert load(tmp_path / "*.jsonl") == [TEXTS[2], *TEXTS[:2]]


def test_repo_id_may_be_a_path(tmp_path):
    source = DatasetSource(repo_id=str(write_jsonl(tmp_path / "rows.jsonl")), split="train")
    assert load_source(source)["text"][:] == TEXTS


def test_reading_leaves_nothing_beside_the_files(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl")
    load(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_split_that_is_needed_or_absent_is_told_with_those_that_exist(tmp_path):
    rows = Dataset.from_dict({"text": TEXTS})
    DatasetDict({"train": rows, "held_out": rows}).save_to_disk(tmp_path / "two")
    assert error(tmp_path / "two").startswith("dataset.train_dataset.split: is missing: ")
    assert error(tmp_path / "two").endswith("has the splits train, held_out; name one")
    assert error(tmp_path / "two", "valid").endswith("has no split 'valid'; it has train, held_out")
    assert error(write_jsonl(tmp_path / "rows.jsonl"), "test").endswith("has no split 'test'; it has train")


def test_what_cannot_be_read_is_told_in_one_line(tmp_path):
    where = "dataset.train_dataset.disk_path: cannot read "
    assert (
        error(tmp_path / "absent")
        == f"{where}{str(tmp_path / 'absent')!r}: there is no such file or folder, or it is empty"
    )
    (tmp_path / "rows.csv").write_text("text\nfirst\n")
    assert "files must be .parquet, .jsonl, .json, .txt, or a folder of save_to_disk" in error(tmp_path / "rows.csv")
    (tmp_path / "broken.jsonl").write_text('{"text": "first"\nsecond')
    assert error(tmp_path / "broken.jsonl").startswith(where)
    (tmp_path / "empty.jsonl").write_text("")
    assert error(tmp_path / "empty.jsonl").endswith("it has no rows")
    (tmp_path / "broken.parquet").write_text("no parquet")
    assert error(tmp_path / "broken.parquet").startswith(where)
    (tmp_path / "mixed").mkdir()
    write_jsonl(tmp_path / "mixed/rows.jsonl")
    (tmp_path / "mixed/notes.txt").write_text("notes")
    assert "it holds json and text files; name one kind by a pattern" in error(tmp_path / "mixed")
    Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "none")
    assert error(tmp_path / "none").endswith("it has no rows")


ROW = '{"text": "a"}\n'


@pytest.mark.parametrize("before", ["", " \n", ROW * (10 * 2**20 // len(ROW) + 1)], ids=["first", "space", "10 MiB"])
def test_a_row_that_is_null_is_refused(tmp_path, before):
    """Read by pyarrow as the first row of ten MiB, it would end the process."""
    (tmp_path / "rows.jsonl").write_text(f"{before}null\n{ROW}")
    assert "a row is null; each must be a mapping" in error(tmp_path / "rows.jsonl")


def test_a_hub_dataset_that_cannot_be_reached():
    with pytest.raises(UserError, match=r"dataset\.train_dataset\.repo_id: cannot read 'nobody/nothing'"):
        load_source(DatasetSource(repo_id="nobody/nothing", split="train"), "dataset.train_dataset")
