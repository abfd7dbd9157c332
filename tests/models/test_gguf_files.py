"""A GGUF file becomes the model that llama.cpp would run, or is refused."""

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from distillkit.config.errors import UserError
from distillkit.models.gguf_files import gguf_parsed_once
from distillkit.models.loading import load_model, load_pretrained_config

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM, gguf.MODEL_ARCH.LLAMA),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, gguf.MODEL_ARCH.QWEN3),
}
TOKENS = torch.arange(4, 60).repeat(5)[None]  # long enough for all frequencies to turn


def made(architecture="llama", **options):
    torch.manual_seed(0)
    config, model, _ = ARCHITECTURES[architecture]
    return model(config(**{**SHAPE, **options})).eval()


def write(path, model, more=lambda writer: None, keep=lambda name: True, extra=()):
    """As llama.cpp's converter does, which stores Llama's rotated halves of a head interleaved."""
    config, architecture = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(10000.0)
    more(writer)
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture][2], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = values.shape[0] // config.head_dim
            halves = values.reshape(heads, 2, config.head_dim // 2, values.shape[1])
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        if keep(name):
            stem, _, end = name.rpartition(".")
            writer.add_tensor(f"{names.get_name(stem)}.{end}", values)
    for name, values in extra:
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same(path, model):
    loaded = load_model(path, dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-3, atol=1e-3)
    return loaded


def error(path):
    with pytest.raises(UserError) as caught:
        load_model(path, key="teacher.path", dtype="float32")
    assert str(caught.value).startswith("teacher.path: ") and "\n" not in str(caught.value)
    return str(caught.value)


def scaled(kind=None, factor=4.0, **more):
    def add(writer):
        if kind is not None:
            writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(factor)
        for name, value in more.items():
            writer.add_key_value(f"llama.rope.scaling.{name}", value, gguf.GGUFValueType.FLOAT32)

    return add


def yarn(writer):
    scaled("yarn")(writer)
    writer.add_rope_scaling_orig_ctx_len(128)


@pytest.mark.parametrize(
    ("rope", "more"),
    [
        (None, lambda writer: None),
        (None, scaled("none")),
        ({"rope_type": "linear", "factor": 4.0}, scaled("linear")),
        ({"rope_type": "linear", "factor": 4.0}, scaled()),  # llama.cpp takes it so
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, yarn),
    ],
)
def test_a_scaled_rotary_embedding_is_the_files(tmp_path, rope, more):
    model = made(**({} if rope is None else {"rope_parameters": {**rope, "rope_theta": 1e4}}))
    assert_same(write(tmp_path / "m.gguf", model, more), model)


def test_frequencies_with_factors_are_llama3s(tmp_path):
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
        "rope_theta": 1e4,
    }
    model = made(head_dim=16, rope_parameters=rope)
    factors = made(head_dim=16).model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    assert factors.max() == 8
    more = lambda writer: writer.add_rope_dimension_count(16)  # noqa: E731
    path = write(tmp_path / "m.gguf", model, more, extra=[("rope_freqs.weight", factors.numpy())])
    loaded = assert_same(path, model)
    loaded.save_pretrained(tmp_path / "saved")
    assert_same(tmp_path / "saved", model)


@pytest.mark.parametrize(
    ("more", "extra", "named"),
    [
        (scaled("longrope"), [], "longrope"),
        (scaled("yarn", attn_factor=2.0), [], "attn_factor"),
        (scaled("linear"), ["rope_freqs.weight"], "linear, rope_freqs.weight"),
        (lambda writer: None, ["rope_factors_long.weight"], "rope_factors_long.weight"),
    ],
)
def test_a_rotary_embedding_that_is_not_read_is_refused(tmp_path, more, extra, named):
    tensors = [(name, np.ones(4, np.float32)) for name in extra]
    message = error(write(tmp_path / "m.gguf", made(), more, extra=tensors))
    assert f"scales its rotary embedding ({named}), which is not read here" in message


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_heads_that_are_not_width_by_heads(tmp_path, architecture):
    model = made(architecture, head_dim=16)

    def sizes(writer):
        writer.add_key_length(16)
        writer.add_value_length(16)
        writer.add_rope_dimension_count(16)

    assert_same(write(tmp_path / "m.gguf", model, sizes), model)
    assert load_pretrained_config(tmp_path / "m.gguf").head_dim == 16


def test_heads_that_are_rotated_in_part_are_refused(tmp_path):
    def sizes(writer):
        writer.add_key_length(8)
        writer.add_rope_dimension_count(4)

    assert "rotates 4 of a head's 8 numbers" in error(write(tmp_path / "m.gguf", made(), sizes))


def test_a_part_of_a_split_model_is_refused(tmp_path):
    def part(writer):
        writer.add_uint16("split.count", 2)

    path = write(tmp_path / "m-00001-of-00002.gguf", made(), part, keep=lambda name: "layers.1" not in name)
    assert "is one of 2 parts of a model; make one file of them first: llama-gguf-split --merge" in error(path)


def test_tensors_that_are_missing_or_not_read_are_named(tmp_path):
    path = write(tmp_path / "m.gguf", made(), keep=lambda name: "layers.1.mlp.up_proj" not in name)
    assert "tensors 1 missing (model.layers.1.mlp.up_proj.weight)" in error(path)
    bias = [("blk.0.attn_q.bias", np.ones(32, np.float32))]
    path = write(tmp_path / "n.gguf", made(), extra=bias)
    assert "tensors 1 that the model does not have (blk.0.attn_q.bias)" in error(path)


def test_a_damaged_file_is_told_in_one_line(tmp_path):
    whole = write(tmp_path / "m.gguf", made()).read_bytes()
    for end in (*range(5, 400, 13), len(whole) // 2, len(whole) - 40):
        (tmp_path / "cut.gguf").write_bytes(whole[:end])
        assert "cut.gguf' is not a whole GGUF file" in error(tmp_path / "cut.gguf")
    for content in (b"", b"<!DOCTYPE html>" * 40):
        (tmp_path / "other.gguf").write_bytes(content)
        assert "does not start with the GGUF magic bytes" in error(tmp_path / "other.gguf")


def test_a_file_of_the_same_name_in_the_current_folder_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    model = made()
    write(tmp_path / "m.gguf", model)
    write(tmp_path / "here/m.gguf", made(initializer_range=0.5))
    monkeypatch.chdir(tmp_path / "here")
    assert_same(tmp_path / "m.gguf", model)
    with pytest.raises(UserError, match=r"'m\.gguf' lies in the current folder, too"):
        load_model("someone/a-model", gguf_file="m.gguf", local_files_only=True)


def test_several_loads_parse_a_file_once(tmp_path, monkeypatch):
    """As those of a run do."""
    parsed, reader = [], gguf.GGUFReader
    counting = lambda path, *given: parsed.append(str(path)) or reader(path, *given)  # noqa: E731
    monkeypatch.setattr(gguf, "GGUFReader", counting)
    path = write(tmp_path / "m.gguf", made())
    with gguf_parsed_once():
        for _ in range(2):
            load_model(path)
    assert len(parsed) == 1
    assert gguf.GGUFReader is counting
