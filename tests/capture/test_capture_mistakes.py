"""What cannot be captured ends in one line, with the key and the remedy."""

import logging
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from distillkit.capture import preparation
from distillkit.cli import main
from distillkit.config import UserError
from distillkit.config.capture import check_capture_ready, load_capture_config
from distillkit.shards import read_manifest, verify_shards
from tests.capture.captures import PLAIN, VOCABULARY, configuration, files, run
from tests.training.tiny import save_llama, save_text, tokenizer

PUBLISHED = {"d": VOCABULARY, "k": 8, "exact_k": 8}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("teacher"), 0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return save_text(tmp_path_factory.mktemp("text") / "text.jsonl", documents=4)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"compression": {}}, "compression.logprob_compressor: is missing: give one of logprob_compressor, "),
        ({"compression": {**PLAIN, "logprob_compressor": PUBLISHED}}, "compression.plain: logprob_compressor is given"),
        ({"compression": {"plane": {}}}, "compression.plane: unknown key; did you mean 'plain'?"),
        ({"compression": {"plain": {"k": 300, "vocab_size": 259}}}, "compression.plain.k: must be <= vocab_size = 259"),
        ({"compression": {"logprob_compressor": {**PUBLISHED, "k": 300}}}, "compression.logprob_compressor.k: must "),
        ({"engine": "vlm"}, "engine: must be one of transformers, vllm; got 'vlm'"),
        ({"teacher": {"path": "t", "top_k": 4}}, "teacher.top_k: compression.plain.k says how many tokens are kept"),
        ({"teacher": {"path": "t", "kind": "dataset"}}, "teacher.kind: must be one of hf; got 'dataset'"),
        ({"sequence_length": 0}, "sequence_length: must be > 0, got 0"),
        ({"rows_per_shard": 0}, "rows_per_shard: must be > 0, got 0"),
        (
            {"dataset": {"train_dataset": {"disk_path": "t"}, "eval_dataset": {"disk_path": "t"}}},
            "dataset.eval_dataset: only train_dataset is captured",
        ),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be(changes, line):
    with pytest.raises(UserError) as error:
        configuration("teacher", "text", "out", **changes)
    assert str(error.value).startswith(line)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"compression": {"plain": {"k": 5, "vocab_size": 257}}},
            "compression.plain.vocab_size: is 257, but the teacher's head has 259 columns, and all of them are "
            "captured, including those without a token in the tokenizer; give 259",
        ),
        (
            {"compression": {"logprob_compressor": {**PUBLISHED, "d": 300}}},
            "compression.logprob_compressor.d: is 300, but the teacher's head has 259 columns",
        ),
        (
            {"rows_per_shard": 10**8},
            "rows_per_shard: 100000000 rows of 24 tokens and 40 bytes each are more than a file",
        ),
        ({"teacher": {"path": "./none"}}, "teacher.path: no such file or folder: './none'"),
    ],
)
def test_what_does_not_fit_the_teacher(teacher, text, tmp_path, changes, line):
    with pytest.raises(UserError) as error:
        run(configuration(teacher, text, tmp_path / "dataset", **changes))
    assert str(error.value).startswith(line)
    assert not (tmp_path / "dataset").exists()


def test_all_columns_of_a_head_that_is_wider_than_the_tokenizer(text, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes)).save_pretrained(tmp_path / "teacher")
    tokenizer().save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match=r"the teacher's head has 320 columns.*; give 320"):
        run(configuration(tmp_path / "teacher", text, tmp_path / "dataset"))
    compression = {"plain": {"k": 320, "vocab_size": 320}}
    printed = run(configuration(tmp_path / "teacher", text, tmp_path / "dataset", compression=compression))
    assert "the stored tokens hold 100.00 % of the teacher's probability; KL(teacher ‖ stored) is " in printed
    assert not (tmp_path / "dataset" / "background.safetensors").exists()  # nothing is outside the top k


def test_rows_longer_than_the_teacher_can_read_are_warned_of(teacher, text, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run(configuration(teacher, text, tmp_path / "dataset", sequence_length=1024))
    assert "sequence_length: is 1024, but the teacher was trained on at most 512 tokens" in caplog.text


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sequence_length": 32}, "sequence_length: is 32, but was 24 when the capture in "),
        ({"compression": {"plain": {"k": 6, "vocab_size": 259}}}, "compression.plain.k: is 6, but was 5 when"),
        ({"teacher": {"path": None, "kwargs": {"dtype": "bfloat16"}}}, "teacher.kwargs.dtype: is 'bfloat16', but was "),
        ({"dataset": {"seed": 1}}, "dataset.seed: is 1, but was 42 when"),
    ],
)
def test_a_folder_of_another_capture_is_refused(teacher, text, tmp_path, changes, line):
    folder = tmp_path / "dataset"
    run(configuration(teacher, text, folder), "1/2")
    before = files(folder)
    if "teacher" in changes:
        changes["teacher"]["path"] = teacher
    if "dataset" in changes:
        changes["dataset"]["train_dataset"] = {"disk_path": text}
    with pytest.raises(UserError) as error:
        run(configuration(teacher, text, folder, **changes))
    assert str(error.value).startswith(line)
    assert str(error.value).endswith("restore it, or choose another output_path")
    assert files(folder) == before


def test_smaller_batches_and_a_text_that_was_moved_go_on(teacher, text, tmp_path, caplog):
    moved, folder = tmp_path / "moved.jsonl", tmp_path / "dataset"
    run(configuration(teacher, text, folder, rows_per_shard=1), "1/2")
    moved.write_bytes(Path(text).read_bytes())
    with caplog.at_level(logging.WARNING):
        printed = run(
            configuration(teacher, moved, folder, rows_per_shard=1, tokens_per_batch=64, trust_remote_code=True)
        )
    assert "tokens_per_batch: is 64, but was 128 when" in caplog.text
    assert "are complete already" in printed and "bytes per token on disk" in printed
    assert verify_shards(folder, read_manifest(folder)) == []


def test_shares_of_two_teachers_are_not_put_together(teacher, text, tmp_path):
    other = save_llama(tmp_path / "other", 3)
    run(configuration(teacher, text, tmp_path / "ours", rows_per_shard=1), "1/2")
    run(configuration(other, text, tmp_path / "theirs", rows_per_shard=1), "2/2")
    before = {**files(tmp_path / "theirs"), **files(tmp_path / "ours")}
    (tmp_path / "both").mkdir()
    for name, content in before.items():
        (tmp_path / "both" / name).write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00001\.parquet belongs to another capture; remove it and its \.json"):
        run(configuration(teacher, text, tmp_path / "both", rows_per_shard=1))
    assert files(tmp_path / "both") == before


def test_a_teacher_that_was_trained_on_meanwhile_is_refused(text, tmp_path):
    teacher, folder = save_llama(tmp_path / "teacher", 0), tmp_path / "dataset"
    run(configuration(teacher, text, folder, rows_per_shard=1), "1/2")
    save_llama(tmp_path / "teacher", 1)
    line = r"^teacher\.path: its weights are not what they were when the capture in .* began"
    with pytest.raises(UserError, match=line):
        run(configuration(teacher, text, folder, rows_per_shard=1))


def test_a_text_that_has_changed_is_refused(teacher, tmp_path):
    text, folder = tmp_path / "text.jsonl", tmp_path / "dataset"
    run(configuration(teacher, save_text(text, documents=4), folder), "1/2")
    save_text(text, documents=5)
    with pytest.raises(
        UserError, match=r"^dataset\.train_dataset: its rows are not what they were when the capture in"
    ):
        run(configuration(teacher, text, folder))


def test_a_folder_that_holds_something_else_is_refused(teacher, text, tmp_path):
    (tmp_path / "other.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds other\.parquet, but no capture; choose another folder"):
        run(configuration(teacher, text, tmp_path))
    assert list(tmp_path.iterdir()) == [tmp_path / "other.parquet"]


def test_the_command(teacher, text, tmp_path, capsys):
    described = tmp_path / "capture.yaml"
    described.write_text(f"""
teacher: {{path: {teacher}}}
sequence_length: 24
dataset: {{train_dataset: {{disk_path: {text}}}}}
compression: {{plain: {{k: 5, vocab_size: 259}}}}
output_path: {tmp_path / "dataset"}
""")
    for words, line in (
        (["compression.plain.k=0"], "error: compression.plain.k: must be > 0, got 0"),
        (["teacher.path=./none"], "error: teacher.path: no such file or folder: './none'"),
        (["dataset.train_dataset.disk_path=./none"], "error: dataset.train_dataset.disk_path: no such file or folder"),
        ([f"output_path={described}"], "error: output_path: "),
        (["--shard", "3/2"], "error: --shard: must be i/n with i from 1 to n, such as 1/4, got '3/2'"),
    ):
        assert main(["capture", str(described), *words]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith(line) and printed.err.count("\n") == 1
        assert not (tmp_path / "dataset").exists()
    assert main(["capture", str(described), "rows_per_shard=3"]) == 0
    assert "bytes per token on disk" in capsys.readouterr().out
    assert (tmp_path / "dataset" / "manifest.json").exists()
    check_capture_ready(load_capture_config(described))


def test_another_capture_is_refused_before_its_text_is_prepared(teacher, text, tmp_path, monkeypatch):
    """The rows that were prepared for the one that was begun stay."""
    folder, prepared = tmp_path / "dataset", tmp_path / "dataset.prepared"
    run(configuration(teacher, text, folder), "1/2")
    before = files(prepared)
    monkeypatch.setattr(preparation, "build_datasets", None)
    other = save_llama(tmp_path / "other", 5)
    for changes in (
        {"sequence_length": 12},
        {"teacher": {"path": other}},
        {"dataset": {"seed": 1, "train_dataset": {"disk_path": text}}},
    ):
        with pytest.raises(UserError, match=r"when the capture in .* began; restore it, or choose another output_path"):
            run(configuration(teacher, text, folder, **changes))
    assert files(prepared) == before
