"""What can be served and under which names, without vLLM."""

import importlib
import tomllib
from pathlib import Path

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from distillkit.serving.served import ARCHITECTURES, KDAShapes, check_served, served_parameter, sliding_windows
from distillkit.student.network import KDAHybridConfig
from tests.student.students import FAMILIES, base_config, student, tokens


def served_student(family="llama", layers=("linear_attention", "full_attention"), config_changes=None, **options):
    return student(family, [*layers], config_changes={"head_dim": 32, **(config_changes or {})}, **options)


@pytest.mark.parametrize("kv_heads", ["expand", "grouped"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_parameter_of_a_layer_has_one_place_in_the_served_one(family, kv_heads):
    changes = {} if family in ("mistral", "qwen2") else {"attention_bias": True}
    model = served_student(family, kv_heads=kv_heads, config_changes={"hidden_size": 128, **changes})
    shapes = KDAShapes.of(model.config)
    rows, places = {}, set()
    for name, parameter in model.model.layers[0].self_attn.named_parameters():
        served, part = served_parameter(name)
        assert (served, part) not in places
        places.add((served, part))
        rows[served] = rows.get(served, 0) + parameter.shape[0]
    key_dim = shapes.num_heads * shapes.head_dim
    expected = {
        "qkv_proj.weight": shapes.conv_channels,
        "conv1d.weight": shapes.conv_channels,
        "gates_proj.weight": 2 * shapes.head_dim + shapes.num_heads,
        "f_proj.weight": key_dim,
        "g_proj.weight": key_dim,
        "g_proj.bias": key_dim,
        "A_log": shapes.num_heads,
        "dt_bias": key_dim,
        "o_norm.weight": shapes.head_dim,
        "o_proj.weight": shapes.hidden_size,
    }
    expected |= {"qkv_proj.bias": shapes.conv_channels} if shapes.qkv_bias else {}
    expected |= {"o_proj.bias": shapes.hidden_size} if shapes.o_bias else {}
    assert rows == expected
    assert (shapes.num_heads, shapes.num_kv_heads) == (4, 2 if kv_heads == "grouped" else 4)


def test_a_sequence_takes_in_a_layer_what_its_cache_does():
    model = served_student().bfloat16()
    layer = model(tokens(1, 5), use_cache=True).past_key_values.layers[0]
    assert KDAShapes.of(model.config).state_bytes == 2 * layer.conv_state.numel() + 4 * layer.recurrent_state.numel()


REFUSALS = {
    "head size": ({"head_dim": 48}, {}, 1, "head_dim: KDA heads of 48; those of 32, 64, 128, 256 can be served"),
    "convolution": ({}, {"conv_size": 5}, 1, "conv_size: 5; 2, 3, 4 can be served"),
    "heads over processes": (
        {},
        {"kv_heads": "grouped"},
        4,
        "tensor_parallel_size: 4 does not divide num_key_value_heads of KDA layers, 2",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_vllm_would_compute_otherwise_is_refused_in_one_line(case):
    changes, options, processes, problem = REFUSALS[case]
    config = KDAHybridConfig(
        base_config(**{"num_hidden_layers": 1, "head_dim": 32, **changes}), ["linear_attention"], **options
    )
    with pytest.raises(ValueError, match="vLLM cannot serve this student") as caught:
        check_served(config, processes)
    assert str(caught.value).endswith(problem) and "\n" not in str(caught.value)


def test_a_teacher_of_another_architecture_is_refused():
    config = KDAHybridConfig({"model_type": "olmo2", "num_hidden_layers": 1}, ["linear_attention"])
    with pytest.raises(ValueError, match="a student of 'olmo2'; those of arcee, llama, mistral, qwen2, qwen3 can be"):
        check_served(config)


def test_speculative_decoding_is_refused():
    config = KDAHybridConfig(base_config(num_hidden_layers=1, head_dim=32), ["linear_attention"])
    check_served(config)
    with pytest.raises(ValueError, match="speculative_config: a state cannot be taken back"):
        check_served(config, speculative=True)


def test_layers_of_full_attention_look_back_as_far_as_the_teachers():
    changes = {"num_hidden_layers": 1, "sliding_window": 16}
    assert sliding_windows(KDAHybridConfig(base_config("mistral", **changes), ["full_attention"])) == [16]
    assert sliding_windows(KDAHybridConfig(base_config(), ["full_attention"] * 4)) == [None] * 4


def test_vllm_has_the_architectures_under_the_names_of_transformers():
    assert {name: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] for name in ARCHITECTURES} == ARCHITECTURES


def test_the_entry_point_is_there():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["distillkit"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert torch  # imported by it; vLLM is not
