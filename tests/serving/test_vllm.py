"""vLLM's classes and kernels, on a CPU: the served student is the student. Needs vLLM 0.24, and NumPy older than 2.4
(Triton's interpreter); a case takes 10 to 30 seconds.
"""

import pytest

pytest.importorskip("vllm")

import torch

from tests.serving.on_cpu import Server, configuration
from tests.serving.test_served import served_student
from tests.student.students import tokens

KDA, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
STUDENTS = {
    "llama": {"layers": [KDA, FULL]},
    "llama without attention, tied head": {"layers": [KDA, KDA], "config_changes": {"tie_word_embeddings": True}},
    "llama with biases": {"layers": [KDA, FULL], "config_changes": {"attention_bias": True}},
    "arcee, plain gate, two taps": {"family": "arcee", "layers": [FULL, KDA], "gate_lower_bound": None, "conv_size": 2},
    "mistral, sliding, with positions": {
        "family": "mistral",
        "layers": [SLIDING, KDA],
        "use_rope": True,
        "config_changes": {"sliding_window": 16},
    },
    "qwen2, grouped heads": {
        "family": "qwen2",
        "layers": [KDA, FULL],
        "kv_heads": "grouped",
        "config_changes": {"hidden_size": 128},
    },
    "qwen3, larger heads": {"family": "qwen3", "layers": [KDA, FULL], "config_changes": {"head_dim": 64}},
    "llama, YaRN": {
        "layers": [KDA, FULL],
        "config_changes": {
            "max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    },
}


@pytest.mark.parametrize("name", STUDENTS)
@torch.no_grad()
def test_it_computes_what_transformers_does(name, tmp_path):
    """Prompts of more and of less than a chunk, read whole and in parts, beside sequences that are being written."""
    model = served_student(**STUDENTS[name])
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) / 10)  # no bias is zero
    model.save_pretrained(tmp_path)
    server = Server(tmp_path, model.state_dict())
    ids = tokens(3, 75)
    expected = model(ids).logits
    steps = [{1: (0, 70), 2: (0, 3)}, {1: (70, 71), 2: (3, 4)}, {1: (71, 72), 2: (4, 9), 3: (0, 2)}]
    for step in steps:
        found = server.step(**{f"s{number}": ids[number - 1, first:last] for number, (first, last) in step.items()})
        for logits, (number, (first, last)) in zip(found, step.items(), strict=True):
            torch.testing.assert_close(logits, expected[number - 1, first:last], atol=2e-5, rtol=1e-4)


def test_a_student_that_cannot_be_served_is_refused_before_it_is_loaded(tmp_path):
    served_student(config_changes={"head_dim": 48}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vLLM cannot serve this student: head_dim: KDA heads of 48"):
        configuration(tmp_path)


def test_a_bias_that_vllms_model_lacks_is_refused(tmp_path):
    model = served_student("qwen3", [FULL, KDA], config_changes={"attention_bias": True})
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.o_proj\.bias has no place in vLLM's Qwen3ForCausalLM"):
        Server(tmp_path, model.state_dict())


def test_memory_of_a_sequence_is_what_is_said(tmp_path):
    model = served_student(kv_heads="grouped")
    model.save_pretrained(tmp_path)
    config = configuration(tmp_path)
    assert config.model_config.is_hybrid and config.model_config.get_head_size() == 32
    server = Server(tmp_path, model.state_dict())
    spec = server.layers[server.kda[0]].get_kv_cache_spec(config)
    assert [*spec.shapes] == [(3, 4 * 32 + 2 * 2 * 32), (4, 32, 32)]
