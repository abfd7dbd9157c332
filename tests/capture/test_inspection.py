"""Inspecting a captured dataset: what is said of it is so, damage is named, what is lost is measured."""

import math
import re
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from distillkit.capture import inspection
from distillkit.capture.inspection import inspect_dataset, stored_rows
from distillkit.capture.packing import pack
from distillkit.capture.run import capture
from distillkit.cli import main
from distillkit.compression import build_codec
from distillkit.config import DatasetSource, UserError
from distillkit.config.capture import CaptureConfig
from distillkit.models.loading import load_model, load_tokenizer
from distillkit.shards import read_background, read_manifest, write_manifest
from tests.capture.captures import files
from tests.training.tiny import BYTES, llama, save_llama, save_text, tokenizer

K = 20


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "teacher", seed=1)


def make_capture(folder, teacher, compression, **teacher_kwargs):
    folder.mkdir(exist_ok=True)
    config = {
        "teacher": {"path": teacher, "kwargs": teacher_kwargs},
        "sequence_length": 48,
        "dataset": {"train_dataset": {"disk_path": str(save_text(folder / "text.jsonl"))}},
        "compression": compression,
        "output_path": str(folder / "captured"),
        "rows_per_shard": 8,
    }
    capture(CaptureConfig.parse(config), console=Console(quiet=True))
    return folder / "captured"


@pytest.fixture(scope="module")
def captured(tmp_path_factory, teacher):
    return make_capture(tmp_path_factory.mktemp("offline"), teacher, {"plain": {"k": K, "vocab_size": BYTES}})


@pytest.fixture
def copy(captured, tmp_path):
    return shutil.copytree(captured, tmp_path / "copy")


def inspected(folder, **options):
    console = Console(record=True, width=200, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    whole = inspect_dataset(folder, console=console, **options)
    return whole, console.export_text()


def test_what_it_is(captured, teacher):
    manifest = read_manifest(captured)
    whole, text = inspected(captured, verify=True)
    assert whole
    lines = dict(line.split("  ", 1) for line in text.splitlines() if "  " in line)
    said = {name: value.strip() for name, value in lines.items()}
    assert said["teacher"] == teacher
    assert said["tokens"] == f"{manifest.tokens:,}"
    assert said["rows"] == f"{manifest.rows:,}"
    assert said["tokens kept"] == f"{K} of a vocabulary of {BYTES}"
    assert said["packed"].startswith("to 48 tokens")
    assert said["background"] == "background.safetensors"
    assert "torch" in said["made with"]
    assert said["shards"] == str(len(manifest.shards))
    assert "every shard is as it was captured" in text


def test_tokens_and_what_the_teacher_expected(captured, teacher):
    """As text; its own distribution at the token, not at the one before."""
    manifest = read_manifest(captured)
    row = next(stored_rows(captured, manifest, build_codec(manifest.codec_kind, manifest.codec_config)))
    model = load_model(teacher)
    document = torch.tensor([row.input_ids[: row.seq_lengths[0]]])
    with torch.no_grad():
        probabilities = model(document).logits[0].softmax(-1)
    header, first = inspected(captured, tokens=3)[1].split("\n\n")[1].splitlines()[:2]
    assert re.split("  +", header) == ["token", "next token", "stored", "teacher's likeliest next tokens"]
    position = 3
    top = probabilities[position].topk(K)
    assert re.split("  +", first)[:4] == [
        repr(tokenizer().decode([row.input_ids[position]])),
        repr(tokenizer().decode([row.input_ids[position + 1]])),
        f"{top.values.sum():.2%}",
        f"{tokenizer().decode([int(top.indices[0])])!r} {top.values[0]:.1%}",
    ]


def test_texts_of_tokens_need_no_teacher_but_its_tokenizer(captured, tmp_path):
    copy = shutil.copytree(captured, tmp_path / "copy")
    manifest = read_manifest(copy)
    write_manifest(copy, replace(manifest, teacher={**manifest.teacher, "path": "someone/their-model"}))
    first = inspected(copy, tokens=3)[1].split("\n\n")[1].splitlines()[1]
    assert first.startswith("'")
    shutil.rmtree(copy / "tokenizer")
    first = inspected(copy, tokens=3)[1].split("\n\n")[1].splitlines()[1]
    assert first.split()[0].isdigit()


def test_divergence_from_the_live_teacher(captured, teacher):
    """Held to its definition, token by token, over all rows of the dataset."""
    manifest = read_manifest(captured)
    codec = build_codec(manifest.codec_kind, manifest.codec_config)
    background = read_background(captured, manifest).exp()
    model = load_model(teacher)
    kl = {"uniform": [], "background": []}
    for row in stored_rows(captured, manifest, codec):
        documents = torch.tensor(row.input_ids).split(row.seq_lengths)
        with torch.no_grad():
            p = torch.cat([model(document[None]).logits[0].double().softmax(-1) for document in documents])
        for name, shape in (("uniform", torch.ones(BYTES)), ("background", background)):
            q = shape.double().repeat(len(p), 1).scatter(-1, row.distribution.ids, 0)
            stored = row.distribution.logprobs.double().exp()
            q = q / q.sum(-1, keepdim=True) * (1 - stored.sum(-1, keepdim=True))
            q = q.scatter(-1, row.distribution.ids, stored)
            kl[name].append((p * (p / q).log()).sum(-1))
    text = inspected(captured, teacher=teacher)[1]
    measured = dict(line.split("  ", 1) for line in text.splitlines() if line.startswith(("KL", "tokens compared")))
    assert int(measured["tokens compared"].replace(",", "")) == manifest.tokens
    for name, label in (("uniform", "rest uniform"), ("background", "rest like background")):
        value = float(measured[f"KL(teacher‖stored), {label}"].split()[0])
        assert math.isclose(value, float(torch.cat(kl[name]).mean()), rel_tol=1e-3, abs_tol=1e-6)


def test_the_rows_that_the_background_was_fitted_on_come_last(copy, teacher, monkeypatch):
    monkeypatch.setattr(inspection, "TOKENS_COMPARED", 48)
    (copy / "shard-00000.parquet").write_bytes(b"")
    assert "KL(teacher‖stored), rest like background" in inspected(copy, teacher=teacher, tokens=0)[1]


def test_the_captured_teacher_is_compared_as_it_was_captured(teacher, tmp_path, monkeypatch):
    """In its dtype and revision, unless another is asked for; one that is not the captured one as it comes."""
    captured = make_capture(
        tmp_path / "offline", teacher, {"plain": {"k": K, "vocab_size": BYTES}}, dtype="bfloat16", revision="main"
    )
    asked = []

    def load(path, **options):
        asked.append(options.get("revision"))
        return load_tokenizer(path, **options)

    monkeypatch.setattr(inspection, "load_tokenizer", load)
    as_captured = inspected(captured, teacher=teacher)[1]
    assert asked == ["main"]
    assert as_captured == inspected(captured, teacher=teacher, dtype="bfloat16")[1]
    single = inspected(captured, teacher=teacher, dtype="float32")[1]
    assert as_captured != single
    shutil.copytree(teacher, tmp_path / "copy")
    assert inspected(captured, teacher=str(tmp_path / "copy"))[1] == single


def test_a_published_dataset(captured, tmp_path, capsys):
    """Without a manifest: what the files say of themselves."""
    manifest, published = read_manifest(captured), tmp_path / "published" / "data"
    published.mkdir(parents=True)
    for shard in captured.glob("*.parquet"):
        shutil.copy(shard, published)
    assert main(["inspect", str(published.parent)]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if line)
    said = {name: value.strip() for name, value in lines.items()}
    assert said["codec"].startswith("unknown, because there is no manifest")
    assert (said["rows"], said["tokens"]) == (f"{manifest.rows:,}", f"{manifest.tokens:,}")
    assert said["files"] == str(len(manifest.shards))
    assert "token_ids list<element: list<element: int32>>" in said["columns"]
    assert main(["inspect", str(published.parent), "--verify"]) == 2
    assert "has no manifest.json to compare it with" in capsys.readouterr().err
    (published / "x.parquet").write_bytes(b"nothing")
    assert main(["inspect", str(published.parent)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_another_teacher_is_refused(captured, tmp_path):
    other = tmp_path / "other"
    save_llama(other, seed=2)
    llama(2, vocab=BYTES + 5).save_pretrained(other)
    with pytest.raises(UserError, match="--teacher: its head has 264 columns, but that of the captured teacher 259"):
        inspected(captured, teacher=str(other))


def damage_truncate(folder):
    path = folder / "shard-00001.parquet"
    path.write_bytes(path.read_bytes()[:-1])


def damage_flip(folder):
    path = folder / "shard-00001.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_foreign(folder):
    (folder / "shard-00001.parquet").write_bytes((folder / "shard-00000.parquet").read_bytes())


def damage_remove(folder):
    (folder / "shard-00001.parquet").unlink()


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_foreign, damage_remove])
def test_verify_names_the_shard_and_fails(copy, damage, capsys):
    damage(copy)
    assert main(["inspect", str(copy), "--verify"]) == 1
    out = capsys.readouterr().out
    assert [line.split(": ")[0] for line in out.splitlines() if line.startswith("shard-0")] == ["shard-00001.parquet"]


def test_what_is_no_captured_dataset_is_one_line(copy, tmp_path, capsys):
    def line(*words):
        assert main(["inspect", *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "no such folder: 'none'" in line("none")
    (tmp_path / "empty").mkdir()
    assert "is not a captured dataset: it has no manifest.json" in line(str(tmp_path / "empty"))
    (copy / "manifest.json").unlink()
    assert "holds a capture that is not complete (" in line(str(copy))


@pytest.mark.parametrize(
    "compression",
    [
        {"plain": {"k": K, "vocab_size": BYTES}},
        {"logprob_compressor": {"d": BYTES, "k": K, "exact_k": 4, "polynomial_terms": [0, 1], "delta_encoding": False}},
        {"legacy_logit_compression": {"vocab_size": BYTES, "k": K, "exact_k": 4, "polynomial_degree": 2}},
    ],
)
def test_pack_then_inspect(teacher, tmp_path, capsys, compression):
    """By the command line: the packed dataset is one too, and says the same of its tokens."""
    captured, packed = make_capture(tmp_path / "offline", teacher, compression), tmp_path / "packed"
    assert main(["pack", str(captured), str(packed), "--sequence-length", "100"]) == 0
    assert main(["inspect", str(packed), "--verify", "--tokens", "0"]) == 0
    assert "to 100 tokens per row" in capsys.readouterr().out
    assert said(packed) == said(captured)
    assert files(packed / "tokenizer") == files(captured / "tokenizer") != {}
    with pytest.raises(UserError, match=r"OUT: .* exists already"):
        pack(DatasetSource(disk_path=str(captured)), packed, 101, Console(quiet=True))


def said(folder):
    """How often each token comes with each word of the teacher."""
    manifest = read_manifest(folder)
    found = Counter()
    for row in stored_rows(folder, manifest, build_codec(manifest.codec_kind, manifest.codec_config)):
        words = zip(row.input_ids, row.distribution.ids.tolist(), row.distribution.logprobs.tolist(), strict=True)
        found.update((token, *ids, *logprobs) for token, ids, logprobs in words)
    return found
