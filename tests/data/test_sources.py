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


def test_names_with_brackets_are_names(tmp_path):
    for name in ("data[v1]/train.jsonl", "train[en].jsonl", "what?*.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        assert load(write_jsonl(tmp_path / name)) == TEXTS
    assert load(tmp_path / "data[v1]") == TEXTS
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved[1]")
    assert load(tmp_path / "saved[1]") == TEXTS


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_no_file_speaks_for_the_columns_of_another(tmp_path, kind):
    """A column that is empty, or missing, in the first file holds what the others have."""
    files = [{"text": ["a"], "note": [None]}, {"text": [None]}, {"text": ["b"], "note": ["x"], "more": [{"c": 1}]}]
    for index, columns in enumerate(files):
        rows = Dataset.from_dict(columns)
        (rows.to_json if kind == "jsonl" else rows.to_parquet)(tmp_path / f"{index}.{kind}")
    for path in (tmp_path, tmp_path / f"*.{kind}"):
        found = load_source(DatasetSource(disk_path=str(path)))
        assert found["text"][:] == ["a", None, "b"]
        assert found["note"][:] == [None, None, "x"]
        assert found["more"][:] == [None, None, {"c": 1}]


def test_no_part_of_a_file_speaks_for_the_rest(tmp_path, monkeypatch):
    rows = [
        {"text": "x" * 9 * 2**20, "note": None},
        {"text": "y" * 2 * 2**20, "note": None},
        {"text": "z", "note": "x"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_source(DatasetSource(disk_path=str(tmp_path / "rows.jsonl")))["note"][:] == [None, None, "x"]


def listing(data_files: str) -> str:
    return f"---\nconfigs:\n- config_name: default\n  data_files: {data_files}\n---\n"


def test_a_readme_lists_files_of_its_folder_alone(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    private = write_jsonl(tmp_path / "private.jsonl")
    write_jsonl(folder / "a.jsonl", TEXTS[:1])
    write_jsonl(folder / "b.jsonl", TEXTS[1:])
    (folder / "link.jsonl").symlink_to(private)
    (folder / "README.md").write_text(listing("./b.jsonl"))
    assert load(folder) == TEXTS[1:]
    (folder / "README.md").write_text(listing("[{split: one, path: a.jsonl}, {split: two, path: 'b*'}]"))
    assert load(folder, "two") == TEXTS[1:]
    for data_files in ("../private.jsonl", str(private), "x/../../private.jsonl", "link.jsonl", "https://a.b/c.jsonl"):
        (folder / "README.md").write_text(listing(data_files))
        assert error(folder).startswith(f"{folder / 'README.md'}: names ")
    (folder / "README.md").write_text(listing("c.jsonl"))
    assert "README.md lists c.jsonl for train, but there is no such file" in error(folder)
    for text in ("---\nconfigs: [\n---\n", "---\nconfigs: 3\n---\n", "---\n- a\n---\n"):
        (folder / "README.md").write_text(text)
        assert error(folder).startswith("dataset.train_dataset.disk_path: cannot read ")


def test_a_saved_dataset_names_files_of_its_folder_alone(tmp_path):
    rows = Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk(tmp_path / "private")
    rows.save_to_disk(tmp_path / "theirs")
    state = tmp_path / "theirs/state.json"
    (arrow,) = (tmp_path / "private").glob("*.arrow")
    content = json.loads(state.read_text())
    for name in (f"../private/{arrow.name}", str(arrow)):
        state.write_text(json.dumps({**content, "_data_files": [{"filename": name}]}))
        assert error(tmp_path / "theirs").startswith(f"{state}: names ")
    state.write_text("[]")
    assert "it is damaged, or was not written by save_to_disk" in error(tmp_path / "theirs")
    (tmp_path / "both").mkdir()
    (tmp_path / "both/dataset_dict.json").write_text('{"splits": ["../private"]}')
    assert "names '../private', which is not in its folder" in error(tmp_path / "both")


def test_the_error_has_the_key_alone_as_its_key(tmp_path):
    """So that a phase that names the source is named, too."""
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError) as caught:
        load_source(DatasetSource.parse({"disk_path": str(tmp_path / "empty.jsonl")}), "dataset.train_dataset")
    assert caught.value.key == "dataset.train_dataset.disk_path"
    assert caught.value.problem.startswith(f"cannot read '{tmp_path}/empty.jsonl': ")
