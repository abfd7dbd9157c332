import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from datasets import Dataset, is_caching_enabled

from distillkit.config.data import DatasetConfig, DatasetSource
from distillkit.config.errors import UserError
from distillkit.data import build_dataset, build_datasets, dataset, rows, workers

TEXTS = [f"the theory of relativity states that time {index} is relative " * (index % 5 + 1) for index in range(40)]


@pytest.fixture
def source(tmp_path: Path) -> DatasetSource:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return DatasetSource(disk_path=str(path))


def test_every_token_of_the_source_is_in_the_rows(source, tiny_tokenizer):
    rows = build_dataset(source, tiny_tokenizer, 64, seed=1)
    eos = tiny_tokenizer.eos_token_id
    expected = Counter(token for text in TEXTS for token in [*tiny_tokenizer(text).input_ids, eos])
    assert Counter(token for row in rows["input_ids"] for token in row) == expected
    assert set(rows.column_names) == {"input_ids", "labels", "seq_lengths"}


def test_the_seed_decides_the_order_and_the_samples(source, tiny_tokenizer):
    def build(seed: int | None, num_samples: int | None = None) -> list[list[int]]:
        return build_dataset(source, tiny_tokenizer, 64, seed=seed, num_samples=num_samples)["input_ids"][:]

    assert build(1) == build(1) != build(2)
    assert build(1, 5) == build(1, 5) != build(2, 5)
    in_order = build_dataset(source, tiny_tokenizer, 4096, num_samples=3)["input_ids"][0]
    assert sorted(in_order) == sorted(
        token for text in TEXTS[:3] for token in [*tiny_tokenizer(text).input_ids, tiny_tokenizer.eos_token_id]
    )
    assert len(build(1, 1000)) == len(build(1))


def test_several_processes_prepare_the_same(source, tiny_tokenizer):
    one = build_dataset(source, tiny_tokenizer, 64, seed=1)
    two = build_dataset(source, tiny_tokenizer, 64, seed=1, num_proc=2)
    assert one["input_ids"][:] == two["input_ids"][:]


def test_long_texts_are_tokenised_by_all_cpus_with_the_same_outcome(source, tiny_tokenizer, tmp_path, monkeypatch):
    one = build_dataset(source, tiny_tokenizer, 64, seed=1)
    by, mapped = [], Dataset.map

    def noted(self, *given, **options):
        by.append(options.get("num_proc"))
        return mapped(self, *given, **options)

    monkeypatch.setattr(Dataset, "map", noted)
    monkeypatch.setattr(workers, "_BYTES_PER_PROCESS", 1000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    three = build_dataset(source, tiny_tokenizer, 64, seed=1)
    assert by[0] == 3
    assert one.to_dict() == three.to_dict()
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    (tmp_path / "numbers.jsonl").write_text("".join(json.dumps({"text": number}) + "\n" for number in range(400)))
    with pytest.raises(UserError, match=r"^dataset\.train_dataset: column 'text' must hold text, got int$"):
        build_dataset(DatasetSource(disk_path=str(tmp_path / "numbers.jsonl")), tiny_tokenizer, 64)
    assert by[-1] == 3


@pytest.mark.parametrize(
    ("count", "size", "cpus", "processes"),
    [(100, 10, 64, None), (1000, 20, 64, 2), (100, 1000, 64, 12), (100, 1000, 8, 8), (3, 10**5, 64, 3)],
)
def test_as_many_processes_tokenise_as_have_work(count, size, cpus, processes, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cpus)))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(workers, "_BYTES_PER_PROCESS", 2**13)
    texts = pa.chunked_array([pa.repeat("x" * size, count)])
    Dataset(pa.table({"text": texts, "other": texts})).save_to_disk(tmp_path / "saved")
    read = Dataset.load_from_disk(tmp_path / "saved").shuffle(seed=1).select_columns(["text"])
    assert workers.processes_for(read) == processes


def test_one_process_leaves_this_ones_threads_as_they_were(source, tiny_tokenizer, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    build_dataset(source, tiny_tokenizer, 64, num_proc=1)
    assert subprocess.run(["printenv", "TOKENIZERS_PARALLELISM"], check=False).returncode == 1


def test_an_interruption_of_several_processes_is_one_and_they_say_nothing(
    source, tiny_tokenizer, tmp_path, monkeypatch, capfd
):
    read, others = rows._read_documents, {*psutil.Process().children(recursive=True)}

    def slowly(*given):
        (tmp_path / f"started-{os.getpid()}").touch()
        time.sleep(10)
        return read(*given)

    def interrupt():  # as a terminal does
        while len(list(tmp_path.glob("started-*"))) < 2:
            time.sleep(0.05)
        for process in (*{*psutil.Process().children(recursive=True)} - others, psutil.Process()):
            process.send_signal(signal.SIGINT)

    monkeypatch.setattr(rows, "_read_documents", slowly)
    timer = threading.Thread(target=interrupt)
    timer.start()
    of_pytest = signal.signal(signal.SIGINT, signal.default_int_handler)  # its workers ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            build_dataset(source, tiny_tokenizer, 64, num_proc=2)
    finally:
        signal.signal(signal.SIGINT, of_pytest)
    timer.join()
    ended = {*psutil.Process().children(recursive=True)} - others
    assert not psutil.wait_procs(ended, timeout=10)[1]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("texts", [TEXTS, ["", *TEXTS]])
def test_phases_tokenise_a_text_once_and_have_the_rows_that_they_have_alone(
    texts, tiny_tokenizer, tmp_path, monkeypatch
):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    read, tokenise = [], dataset.tokenize_rows

    def noted(given, *others, **options):
        read.append(len(given))
        return tokenise(given, *others, **options)

    monkeypatch.setattr(dataset, "tokenize_rows", noted)
    tokenised = dataset.TokenisedTexts()

    def build(seed, length, num_samples=None, tokenised=tokenised):
        source = DatasetSource(disk_path=str(path))
        options = {"seed": seed, "num_samples": num_samples, "tokenised": tokenised}
        return build_dataset(source, tiny_tokenizer, length, **options).to_dict()

    phases = [(42, 64), (43, 64), (44, 128, 20), (None, 32)]
    together = [build(*phase) for phase in phases]
    assert read == ([40] if texts == TEXTS else [41, 41, 20, 41])  # a row without text has no document to be known by
    assert together == [build(*phase, *[None] * (3 - len(phase)), tokenised=None) for phase in phases]
    path.write_text(json.dumps({"text": "other text"}) + "\n")
    assert build(42, 64) == build(42, 64, tokenised=None) != together[0]


def test_nothing_is_written_beside_a_saved_dataset(tmp_path, tiny_tokenizer):
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    before = sorted((tmp_path / "saved").iterdir())
    build_dataset(DatasetSource(disk_path=str(tmp_path / "saved")), tiny_tokenizer, 64, seed=1)
    assert sorted((tmp_path / "saved").iterdir()) == before
    assert is_caching_enabled()


def test_prepacked_rows(tmp_path, tiny_tokenizer):
    Dataset.from_dict({"input_ids": [[5, 6, 7, 8], [9, 10]]}).save_to_disk(tmp_path / "packed")
    rows = build_dataset(DatasetSource(disk_path=str(tmp_path / "packed")), tiny_tokenizer, 4, prepacked=True)
    assert rows["labels"][:] == [[-100, 6, 7, 8], [-100, 10]]


def test_rows_that_give_nothing(tmp_path, tiny_tokenizer, source):
    Dataset.from_dict({"text": ["", ""]}).save_to_disk(tmp_path / "blank")
    with pytest.raises(UserError, match="has only empty rows"):
        build_dataset(DatasetSource(disk_path=str(tmp_path / "blank")), tiny_tokenizer, 4)
    with pytest.raises(UserError, match=r"dataset\.train_dataset: has no column input_ids; remove prepacked"):
        build_dataset(source, tiny_tokenizer, 4, prepacked=True)


def test_prepared_rows_are_read_again_until_something_changes(source, tiny_tokenizer, tmp_path, caplog):
    folder = tmp_path / "prepared/train"

    def build(sequence_length: int = 64) -> list[list[int]]:
        return build_dataset(source, tiny_tokenizer, sequence_length, seed=1, prepared_path=folder)["input_ids"][:]

    first, made = build(), (folder / "made_from.json").stat().st_mtime_ns
    assert build() == first
    assert (folder / "made_from.json").stat().st_mtime_ns == made
    assert caplog.messages == []

    assert build(32) != first
    assert caplog.messages == [f"{folder} is prepared again, because these have changed: sequence_length"]
    with open(source.disk_path, "a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    assert sum(map(len, build(32))) > sum(map(len, first))
    assert caplog.messages[1:] == [f"{folder} is prepared again, because these have changed: files"]
    tiny_tokenizer("padding", padding="max_length", max_length=12)  # leaves its mark in the tokenizer's state
    build(32)
    assert len(caplog.messages) == 2


def test_a_run_killed_while_preparing_leaves_nothing_half(source, tiny_tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "prepared"

    def killed(self: Dataset, path: Path) -> None:
        path.mkdir()
        (path / "data-00000-of-00001.arrow").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "save_to_disk", killed)
        with pytest.raises(KeyboardInterrupt):
            build_dataset(source, tiny_tokenizer, 64, prepared_path=folder)
    assert not folder.exists()
    assert len(build_dataset(source, tiny_tokenizer, 64, prepared_path=folder)) > 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".prepared.lock", "prepared", "train.jsonl"]


def test_a_folder_of_something_else_is_not_touched(source, tiny_tokenizer, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"prepared_dataset_path: .*thesis holds something else; name a new folder"):
        build_dataset(source, tiny_tokenizer, 64, prepared_path=tmp_path / "thesis")
    assert (tmp_path / "thesis/chapter.tex").read_text() == "years of work"


def test_the_configuration_names_both_datasets(source, tiny_tokenizer, tmp_path, caplog):
    caplog.set_level(logging.INFO, "distillkit")
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"body": "time is relative"}) + "\n")
    config = DatasetConfig.parse(
        {
            "train_dataset": {"disk_path": str(held_out)},
            "eval_dataset": {"disk_path": str(held_out)},
            "dataset_text_field": "body",
            "prepared_dataset_path": str(tmp_path / "prepared"),
        }
    )
    train, evaluation = build_datasets(config, tiny_tokenizer, 64)
    assert evaluation is not None
    assert train["input_ids"][:] == evaluation["input_ids"][:]
    assert {"train", "eval"} <= {entry.name for entry in (tmp_path / "prepared").iterdir()}
    assert caplog.messages[0].startswith("dataset.train_dataset: 1 rows of 64 tokens, ")
    with pytest.raises(UserError, match=r"^evaluation\.dataset: has the columns text; one of these is needed"):
        build_datasets(config, tiny_tokenizer, 64, source)


def test_a_student_of_conversations_may_be_measured_on_texts(source, tiny_tokenizer, tmp_path):
    talk = [{"role": "user", "content": "time?"}, {"role": "assistant", "content": "relative"}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    settings = {"eval_dataset": source.model_dump(exclude_none=True), "assistant_only_loss": True}
    talks = {"train_dataset": {"disk_path": str(tmp_path / "talk.jsonl")}}
    train, evaluation = build_datasets(DatasetConfig.parse({**talks, **settings}), tiny_tokenizer, 64)
    assert tiny_tokenizer.decode([label for label in train["labels"][0] if label != -100]) == "relative<|im_end|>"
    assert evaluation is not None
    assert all(labels.count(-100) < len(TEXTS) for labels in evaluation["labels"])
    _, evaluation = build_datasets(
        DatasetConfig.parse({**talks, **settings, "eval_dataset": talks["train_dataset"]}), tiny_tokenizer, 64
    )
    assert evaluation["labels"][:] == train["labels"][:]
    with pytest.raises(UserError, match="column text holds no conversations"):
        build_datasets(DatasetConfig.parse({**settings, "train_dataset": settings["eval_dataset"]}), tiny_tokenizer, 64)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    "columns", [{"input_ids": [[7]] * 4}, {"input_ids": [[5, 6]] * 2, "labels": [[-100, -100]] * 2}]
)
def test_rows_in_which_nothing_counts_are_refused(tmp_path, tiny_tokenizer, columns, packing):
    Dataset.from_dict(columns).save_to_disk(tmp_path / "rows")
    with pytest.raises(UserError, match=r"^dataset\.train_dataset: no token counts: all labels are -100, or "):
        build_dataset(DatasetSource(disk_path=str(tmp_path / "rows")), tiny_tokenizer, 4, packing=packing)
