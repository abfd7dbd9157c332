"""A model on the meta device, whose tensors are in files, is the model that loading makes."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from distillkit.config.errors import UserError
from distillkit.models.loading import load_model
from distillkit.models.streaming import StoredModel, open_stored
from tests.conversion.teachers import FAMILIES, teacher_of
from tests.student.students import student


def named(model):
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    places = {}
    return {name: (places.setdefault(id(tensor), name), tensor) for name, tensor in tensors.items()}


def assert_stored_as_loaded(folder, **options):
    loaded = named(load_model(folder, **options))
    stored = open_stored(folder, key="model", trust_remote_code=False, **options)
    assert isinstance(stored, StoredModel)
    found = named(stored.model)
    assert {name: (place, each.dtype, each.shape) for name, (place, each) in found.items()} == {
        name: (place, each.dtype, each.shape) for name, (place, each) in loaded.items()
    }
    for name, (_, tensor) in loaded.items():
        assert torch.equal(stored.read(name) if found[name][1].is_meta else found[name][1], tensor), name
        if found[name][1].is_meta and tensor.dim() > 0:
            middle = range(len(tensor) // 3, len(tensor) // 2)
            assert torch.equal(stored.read(name, middle), tensor[middle.start : middle.stop]), name


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_teachers(family, dtype, tmp_path):
    tied = family in ("llama", "qwen3")
    teacher_of(family, tie_word_embeddings=tied).save_pretrained(tmp_path, max_shard_size=30_000)
    assert_stored_as_loaded(tmp_path, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_students(dtype, tmp_path):
    """A_log and dt_bias stay in float32."""
    student().save_pretrained(tmp_path)
    assert_stored_as_loaded(tmp_path, dtype=dtype, attn_implementation="sdpa")


def test_nan_is_refused_where_it_is_read(tmp_path):
    teacher_of("llama").save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.norm.weight"
    weights = load_file(path)
    weights[name][-1] = torch.nan
    save_file(weights, path, {"format": "pt"})
    stored = open_stored(tmp_path, key="model", trust_remote_code=False)
    stored.read(name, range(1))
    with pytest.raises(UserError, match=rf"^model: .*1 of its tensors hold NaN or infinity \({re.escape(name)}\)$"):
        stored.read(name, range(1, len(weights[name])))
