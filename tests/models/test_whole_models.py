"""A model is what its files hold: nothing missing, nothing left out, nothing that is no number."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from distillkit.capture.transformers_engine import TransformersEngine
from distillkit.config import StudentConfig
from distillkit.config.errors import UserError
from distillkit.conversion import build_student
from distillkit.models.decoder import check_head
from distillkit.models.loading import load_model
from tests.training.tiny import VOCAB, llama

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    llama(0, tied=False).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def error(folder, **options):
    with pytest.raises(UserError) as caught:
        load_model(folder, key="teacher.path", **options)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert str(caught.value).startswith("teacher.path: ")
    return str(caught.value)


def rename_all(weights):
    for name in list(weights):
        weights[f"m.{name}"] = weights.pop(name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: weights.pop(UP), f"tensors 1 missing ({UP})"),
        (lambda weights: weights.update({"odd": torch.ones(2)}), "tensors 1 that the model does not have (odd)"),
        (
            lambda weights: weights.update({UP: torch.ones(3, 32)}),
            f"tensors 1 of another shape than its configuration says ({UP} [3, 32], not [64, 32])",
        ),
        (rename_all, "tensors 21 missing (lm_head.weight, model.embed_tokens.weight, "),
    ],
)
def test_files_that_are_not_the_models_are_refused(folder, caplog, change, said):
    change_weights(folder, change)
    assert said in error(folder)
    assert caplog.messages == []


def test_embeddings_resized_without_the_configuration(folder):
    change_config(folder, vocab_size=VOCAB + 8)
    assert "tensors 2 of another shape than its configuration says (lm_head.weight [97, 32], not [105" in error(folder)


def test_what_may_be_absent_or_superfluous(tmp_path):
    """A head that is tied; frequencies, which checkpoints of old hold."""
    llama(0, tied=True).save_pretrained(tmp_path)
    change_weights(
        tmp_path, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    )
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path).lm_head.weight, llama(0, tied=True).lm_head.weight)


def test_a_head_tied_by_name_only_stays_the_files(folder, tmp_path, caplog):
    wanted = load_model(folder).lm_head.weight
    change_config(folder, tie_word_embeddings=True)
    teacher = load_model(folder)
    assert "its config.json ties the head to the embeddings, but its files hold a head of its own" in caplog.text
    student = build_student(teacher, StudentConfig.parse({"full_attention_layers": [0, 1], "keep_rope": True}))
    student.save_pretrained(tmp_path / "student")
    teacher.save_pretrained(tmp_path / "teacher")
    for model in (teacher, student, *(load_model(tmp_path / name) for name in ("student", "teacher"))):
        assert torch.equal(model.lm_head.weight, wanted)
        assert not model.config.tie_word_embeddings


def test_an_adapter_beside_the_weights_is_told(folder, tmp_path):
    (folder / "adapter_config.json").write_text("{}")
    assert "has an adapter (adapter_config.json), which is not applied here; merge it" in error(folder)
    (tmp_path / "alone").mkdir()
    (folder / "adapter_config.json").rename(tmp_path / "alone/adapter_config.json")
    (folder / "model.safetensors").rename(tmp_path / "alone/adapter_model.safetensors")
    assert "has an adapter" in error(tmp_path / "alone")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers(folder, value):
    change_weights(folder, lambda weights: weights[UP][3].fill_(value))
    assert f"1 of its tensors hold NaN or infinity ({UP})" in error(folder)


def test_weights_beyond_float16(folder):
    change_weights(folder, lambda weights: weights[UP].mul_(1e6))
    load_model(folder, dtype="bfloat16")
    assert "float16 ends at 65504; load it in bfloat16 or float32" in error(folder, dtype="float16")


def test_where_outputs_become_infinite_is_said(folder):
    change_weights(folder, lambda weights: [weights[name].mul_(2e4) for name in weights if "layers.1.mlp" in name])
    model = load_model(folder, dtype="float16")
    said = r"teacher.path: LlamaForCausalLM in float16 gives NaN or infinity, first behind layers\.1\.mlp"
    with pytest.raises(UserError, match=said):
        check_head(model, "teacher.path")
    rows = [{"input_ids": [5, 6, 7], "seq_lengths": [3]}]
    with pytest.raises(UserError, match=said):
        list(TransformersEngine(model, 64).top_k(rows, 4))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        "[" * 100_000,
        '{"model_type": 7}',
        '{"model_type": "llama", "num_hidden_layers": "two"}',
        '{"model_type": "llama", "num_attention_heads": 0}',
        '{"model_type": "llama", "hidden_size": null}',
        '{"model_type": "llama", "rope_parameters": []}',
        '{"model_type": "kda_hybrid", "base_config": {}}',
        '{"model_type": "kda_hybrid", "base_config": 3}',
    ],
)
def test_a_damaged_configuration_is_told_in_one_line(folder, content):
    (folder / "config.json").write_text(content)
    error(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8 + b"{}", bytes(8) + b"{}", b"\x02" + bytes(7) + b"[]"])
def test_damaged_weights_are_told_in_one_line(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    error(folder)
