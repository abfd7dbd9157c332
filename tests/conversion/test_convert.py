"""A conversion exchanges the attention of the given layers, and nothing else; its folder loads, or is not there."""

import json
import resource

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GPT2Config, GptOssConfig, Phi3Config

from distillkit.config import StudentConfig, UserError
from distillkit.conversion import build_student, convert
from tests.conversion.teachers import FAMILIES, SHAPE, teacher_of, token_ids

HYBRID = StudentConfig()
ALL_FULL = StudentConfig.parse({"full_attention_layers": [0, 1, 2, 3], "keep_rope": True})


@pytest.fixture
def teacher_folder(tmp_path, tiny_tokenizer):
    folder = tmp_path / "teacher"
    teacher_of("llama", tie_word_embeddings=True).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_full_with_rope_reproduces_the_teachers_logits(family):
    teacher = teacher_of(family)
    with torch.no_grad():
        assert torch.equal(build_student(teacher, ALL_FULL)(token_ids()).logits, teacher(token_ids()).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_exchanged_is_copied_bit_for_bit(family):
    teacher = teacher_of(family)
    student = build_student(teacher, HYBRID).state_dict()
    exchanged = tuple(f"model.layers.{index}.self_attn." for index in range(3))
    kept = {name: tensor for name, tensor in teacher.state_dict().items() if not name.startswith(exchanged)}
    assert {name for name in student if not name.startswith(exchanged)} == set(kept)
    assert all(torch.equal(student[name], tensor) for name, tensor in kept.items())
    for norm in ("q_norm", "k_norm") if family == "qwen3" else ():
        assert f"model.layers.3.self_attn.{norm}.weight" in student


def test_folder_loads_as_the_student_it_was_built_as(teacher_folder, tmp_path):
    summary = convert(teacher_folder, tmp_path / "student", HYBRID)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    built = build_student(AutoModelForCausalLM.from_pretrained(teacher_folder), HYBRID)
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, built(token_ids()).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.generation_config.eos_token_id == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "student")("time").input_ids
    assert summary.student_parameters == sum(parameter.numel() for parameter in loaded.parameters())
    names = {path.name for path in (tmp_path / "student").iterdir()}
    assert {"model.safetensors", "generation_config.json", "modeling.py", "kda_attention.py"} <= names
    assert "AutoModelForCausalLM" in json.loads((tmp_path / "student" / "config.json").read_text())["auto_map"]


def test_dtype_of_the_teacher_is_kept(teacher_folder, tmp_path):
    convert(teacher_folder, tmp_path / "student", HYBRID, dtype="bfloat16")
    weights = load_file(tmp_path / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_same_seed_same_student(teacher_folder, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert(teacher_folder, tmp_path / name, StudentConfig.parse({"seed": seed}))
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_existing_folder_is_refused_and_left_alone(teacher_folder, tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "precious").write_text("thesis")
    with pytest.raises(UserError, match="student' exists already"):
        convert(teacher_folder, tmp_path / "student", HYBRID)
    assert [path.name for path in (tmp_path / "student").iterdir()] == ["precious"]


def test_empty_folder_is_used(teacher_folder, tmp_path):
    (tmp_path / "student").mkdir()
    convert(teacher_folder, tmp_path / "student", HYBRID)
    assert (tmp_path / "student" / "config.json").exists()


def test_nothing_is_left_of_a_conversion_that_cannot_be_written(teacher_folder, tmp_path):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, unlimited[1]))  # the weights are larger
    try:
        with pytest.raises(UserError, match="the disk is full while the student was written"):
            convert(teacher_folder, tmp_path / "student", HYBRID)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=300), "GPT2LMHeadModel.*no `layers`"),
        (Phi3Config(**SHAPE), "layer 0.self_attn has no linear q_proj, k_proj, v_proj"),
        (Gemma2Config(**SHAPE), "Gemma2ForCausalLM changes its logits after the head"),
        (
            GptOssConfig(**{**SHAPE, "num_local_experts": 2, "num_experts_per_tok": 1}),
            "layer 0.self_attn has sinks, for which KDA has no place",
        ),
    ],
)
def test_teacher_that_cannot_be_converted_is_refused_by_what_it_lacks(config, message):
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(config).eval()
    teacher.get_output_embeddings().weight.data.mul_(1000)  # logits large enough for a soft cap to show
    with pytest.raises(UserError, match=message):
        build_student(teacher, HYBRID)


def test_student_as_teacher_is_refused():
    with pytest.raises(UserError, match="KDAHybridForCausalLM is no decoder of transformers' own"):
        build_student(build_student(teacher_of("llama"), HYBRID), HYBRID)
