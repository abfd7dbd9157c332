"""The figures of the table: parameters at real shapes, and the memory that decoding really takes."""

import io

import pytest
import torch
from rich.console import Console
from transformers import ArceeConfig, AutoModelForCausalLM

from distillkit.config import StudentConfig
from distillkit.conversion import build_student, student_on_meta, summarize
from distillkit.student.mixers.registry import MIXERS
from tests.conversion.teachers import teacher_of, token_ids


def afm_summary(**student):
    config = ArceeConfig(
        hidden_size=2560,
        intermediate_size=18432,
        num_hidden_layers=36,
        num_attention_heads=20,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=128005,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(config)
    return summarize(teacher, student_on_meta(config, StudentConfig.parse(student)))


def test_parameters_of_afm_4_5b():
    expanded, grouped = afm_summary(), afm_summary(kv_heads="grouped")
    assert round(expanded.teacher_parameters / 1e9, 2) == 4.62
    assert round(expanded.student_parameters / 1e9, 2) == 4.94
    assert round(grouped.student_parameters / 1e9, 2) == 4.66


def test_memory_of_afm_4_5b():
    at_128k = afm_summary().memory[-1]
    assert at_128k.tokens == 131072
    assert at_128k.teacher_kv_cache == 36 * 131072 * 2 * 4 * 128 * 2  # layers, tokens, K and V, heads, size, bytes
    assert at_128k.student_kv_cache == at_128k.teacher_kv_cache / 4
    assert at_128k.student_state == 27 * (20 * 128 * 128 * 4 + 3 * 3 * 2560 * 2)


@pytest.mark.parametrize("kv_heads", ["expand", "grouped"])
def test_state_is_what_a_cache_holds(kv_heads):
    model = build_student(teacher_of("llama"), StudentConfig.parse({"kv_heads": kv_heads}))
    with torch.no_grad():
        layer = model(token_ids(batch=1), use_cache=True).past_key_values.layers[0]
    held = sum(state.numel() * state.element_size() for state in (layer.conv_state, layer.recurrent_state))
    assert MIXERS["kda"].state_bytes(model.model.layers[0].self_attn) == held


def test_a_sliding_window_bounds_the_kv_cache():
    teacher = teacher_of("mistral", sliding_window=8192)
    first, *rest = summarize(teacher, build_student(teacher, StudentConfig())).memory
    assert {row.teacher_kv_cache for row in rest} == {2 * first.teacher_kv_cache}


def test_table_shows_each_mixer_once_per_run_of_layers():
    teacher = teacher_of("llama")
    console = Console(file=io.StringIO(), width=100)
    console.print(summarize(teacher, build_student(teacher, StudentConfig())))
    text = console.file.getvalue()
    assert "0-2" in text and "KDA" in text and "full attention, NoPE" in text
    assert "128k" in text and "MiB" in text
