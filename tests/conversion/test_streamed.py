"""A teacher that is converted layer by layer becomes, to the byte, what it becomes in memory."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from distillkit.config import StudentConfig, UserError
from distillkit.conversion import build_student, convert
from distillkit.conversion.files import ModelFiles
from distillkit.models.loading import load_model
from tests.conversion.teachers import FAMILIES, teacher_of
from tests.memory import peak_of, reset_peak

KB = 30_000
"""Of one file: less than a layer, so that layers are torn apart."""

SPREAD = {"short_convolution": "default", "output_scale": "default", "memory": "spread"}
CHOICES = [
    {"layout": "hybrid"},
    {"layout": "front_loaded", "kv_heads": "grouped", "keep_rope": True, "initialization": SPREAD},
    {"layout": "kda_only", "seed": 3, "initialization": {**SPREAD, "memory": "attended"}},
    {"full_attention_layers": [0, 2], "kv_heads": "grouped", "initialization": {**SPREAD, "output_scale": "fitted"}},
]


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    """Where a teacher goes; its tokenizer is there."""
    tiny_tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def converted(folder: Path, student: dict, **kwargs) -> str:
    """What is printed; the student in `student` is equal to that of the loaded teacher."""
    choice, printed = StudentConfig.parse(student), io.StringIO()
    for name in ("student", "whole"):
        shutil.rmtree(folder.parent / name, ignore_errors=True)
    console = Console(file=printed, width=200)
    convert(folder, folder.parent / "student", choice, max_shard_size=KB, console=console, **kwargs)
    build_student(load_model(folder, **kwargs), choice).save_pretrained(folder.parent / "whole", max_shard_size=KB)
    expected = {path.name: path.read_bytes() for path in (folder.parent / "whole").iterdir()}
    found = {name: (folder.parent / "student" / name).read_bytes() for name in expected}
    assert [name for name in expected if found[name] != expected[name]] == []
    assert len([name for name in expected if name.endswith(".safetensors")]) > 4
    return printed.getvalue()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_choice_is_what_it_is_in_memory(folder, family):
    tied = family in ("llama", "qwen3")
    teacher_of(family, tie_word_embeddings=tied, max_position_embeddings=64).save_pretrained(folder, max_shard_size=KB)
    for student in CHOICES:
        assert converted(folder, student) == ""


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
)
def test_scaled_rotary_embeddings_and_16_bits(folder, rope):
    teacher = teacher_of("llama", rope_parameters={**rope, "rope_theta": 10_000.0}, max_position_embeddings=64)
    teacher.bfloat16().save_pretrained(folder)
    assert converted(folder, {"keep_rope": True, "initialization": SPREAD}) == ""
    assert converted(folder, {"keep_rope": True}, dtype="float32") == ""


def test_weights_in_8_bits_without_scales(folder):
    teacher_of("llama", max_position_embeddings=64).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    small = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights.items() if "_proj" in name}
    save_file({**weights, **small}, folder / "model.safetensors", {"format": "pt"})
    assert converted(folder, {}, dtype="float32") == ""


@pytest.mark.parametrize("head", ["equal", "another", "alone"])
def test_a_head_that_should_be_tied_is_the_one_of_the_files(folder, head):
    teacher_of("llama", tie_word_embeddings=True, max_position_embeddings=64).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * (2 if head == "another" else 1)
    if head == "alone":
        del weights["model.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert converted(folder, {}) == ""
    tied = json.loads((folder.parent / "student/config.json").read_text())["tie_word_embeddings"]
    assert tied == (head != "another")


def test_a_teacher_for_which_more_is_asked_is_loaded_whole_and_that_is_said(folder):
    teacher_of("llama").save_pretrained(folder)
    said = "the teacher is loaded whole into memory, because device_map asked for it\n"
    convert(folder, folder.parent / "student", StudentConfig(), device_map="cpu", console=(console := printing()))
    assert console.file.getvalue() == said


def printing() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop("model.layers.2.mlp.up_proj.weight"),
        lambda weights: weights.update({"odd": torch.ones(2)}),
        lambda weights: weights.update({"model.norm.weight": torch.ones(3)}),
        lambda weights: weights["model.layers.2.mlp.up_proj.weight"].fill_(torch.nan),
    ],
)
def test_files_that_are_not_the_models_are_refused_as_they_are_in_memory(folder, change):
    teacher_of("llama").save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as in_memory:
        load_model(folder, key="teacher")
    with pytest.raises(UserError) as streamed:
        convert(folder, folder.parent / "student", StudentConfig())
    assert str(streamed.value) == str(in_memory.value)
    assert [path.name for path in folder.parent.iterdir()] == ["teacher"]


def test_a_conversion_that_is_interrupted_leaves_nothing(folder, monkeypatch):
    teacher_of("llama").save_pretrained(folder)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ModelFiles, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, folder.parent / "student", StudentConfig())
    assert [path.name for path in folder.parent.iterdir()] == ["teacher"]


def test_a_disk_without_room_is_told_before_anything_is_computed(folder, monkeypatch):
    teacher_of("llama").save_pretrained(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2000, 1000, 1000))
    with pytest.raises(UserError, match=r"^output_path: has no room: 0 MiB are free at .* the student needs 0 MiB"):
        convert(folder, folder.parent / "student", StudentConfig())


def test_one_layer_is_in_memory_at_a_time(folder):
    """Of 100 MB in 13 files; a layer has 8 MB, and both models whole would have 200."""
    shape = {"hidden_size": 384, "intermediate_size": 1280, "num_attention_heads": 6, "num_key_value_heads": 6}
    teacher_of("llama", **shape, head_dim=64, num_hidden_layers=12, max_position_embeddings=64).save_pretrained(
        folder, max_shard_size="9MB"
    )
    try:
        reset_peak()
    except OSError:
        pytest.skip("peak memory cannot be reset here")
    peak, _ = peak_of(lambda: convert(folder, folder.parent / "student", StudentConfig()))
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 90e6
    assert peak < 75e6
