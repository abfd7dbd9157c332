"""What a KDA layer starts from: the teacher's projections, and new parameters that mean what the options say."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from distillkit.config import StudentConfig, UserError
from distillkit.conversion import build_student
from distillkit.student.mixers.calibration import repeated_tokens
from distillkit.student.mixers.kda.initialize import set_memory
from distillkit.student.network.delta_rule import log_decay
from tests.conversion.teachers import teacher_of, token_ids


def first_layer(family: str = "llama", teacher_changes: dict | None = None, **student):
    """The teacher's first attention, and the KDA layer that takes its place."""
    teacher = teacher_of(family, **(teacher_changes or {}))
    model = build_student(teacher, StudentConfig.parse(student))
    return teacher.model.layers[0].self_attn, model.model.layers[0].self_attn


def test_expanded_heads_repeat_the_key_and_value_heads_of_their_group():
    teacher, kda = first_layer("llama")
    assert torch.equal(kda.q_proj.weight, teacher.q_proj.weight)
    assert torch.equal(kda.o_proj.weight, teacher.o_proj.weight)
    for name in ("k_proj", "v_proj"):
        old = teacher.get_submodule(name).weight.unflatten(0, (2, 16))
        new = kda.get_submodule(name).weight.unflatten(0, (4, 16))
        for head in range(4):  # query heads 0 and 1 look at key/value head 0, 2 and 3 at head 1
            assert torch.equal(new[head], old[head // 2])


def test_grouped_heads_keep_the_teachers_projections():
    teacher, kda = first_layer("llama", kv_heads="grouped")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert torch.equal(kda.get_submodule(name).weight, teacher.get_submodule(name).weight)


def test_expanded_and_grouped_heads_compute_the_same():
    options = {"initialization": {"output_scale": "default"}}
    _, expanded = first_layer("llama", **options)
    _, grouped = first_layer("llama", kv_heads="grouped", **options)
    hidden_states = torch.randn(2, 30, 48)
    for name in ("f_proj", "g_proj", "b_proj"):  # drawn alike in both
        grouped.get_submodule(name).load_state_dict(expanded.get_submodule(name).state_dict())
    grouped.dt_bias.data.copy_(expanded.dt_bias)
    torch.testing.assert_close(expanded(hidden_states)[0], grouped(hidden_states)[0])


def test_biases_of_qwen2_are_repeated_with_their_heads():
    teacher, kda = first_layer("qwen2")
    assert torch.equal(kda.q_proj.bias, teacher.q_proj.bias)
    assert torch.equal(
        kda.v_proj.bias.unflatten(0, (4, 16)), teacher.v_proj.bias.unflatten(0, (2, 16)).repeat_interleave(2, 0)
    )
    assert kda.o_proj.bias is None


@pytest.mark.parametrize(("part", "heads"), [("q", 4), ("k", 2)])
def test_norms_of_qwen3_keep_the_direction_of_queries_and_keys(part, heads):
    teacher, kda = first_layer("qwen3", kv_heads="grouped")
    hidden_states = torch.randn(5, 48)
    projected = teacher.get_submodule(f"{part}_proj")(hidden_states).unflatten(-1, (heads, 16))
    theirs = teacher.get_submodule(f"{part}_norm")(projected)
    ours = kda.get_submodule(f"{part}_proj")(hidden_states).unflatten(-1, (heads, 16))
    torch.testing.assert_close(F.normalize(ours, dim=-1), F.normalize(theirs, dim=-1))


@pytest.mark.parametrize(("kind", "sizes"), [("identity", (1, 1, 1)), ("linear", (0.1, 0.1, 1))])
def test_convolution_starts_with_only_the_token_itself(kind, sizes):
    _, kda = first_layer("llama", initialization={"short_convolution": kind})
    for convolution, size in zip((kda.q_conv1d, kda.k_conv1d, kda.v_conv1d), sizes, strict=True):
        assert torch.equal(convolution.weight[..., -1], torch.full_like(convolution.weight[..., -1], size))
        assert not convolution.weight[..., :-1].any()


def memory(kda) -> torch.Tensor:
    """Tokens in which each channel decays by a factor e, where the gate's projection says nothing."""
    return -1 / log_decay(torch.zeros(4, 16), kda.A_log, kda.dt_bias, kda.gate_lower_bound)


def test_spread_memory_goes_from_2_to_256_tokens():
    _, kda = first_layer("llama", initialization={"memory": "spread"})
    ratio = 128 ** (1 / 3)  # from each of the four heads to the next
    expected = torch.tensor([2, 2 * ratio, 2 * ratio**2, 256]).unsqueeze(1).expand(4, 16)
    torch.testing.assert_close(memory(kda), expected, rtol=1e-3, atol=0)


def test_attended_memory_is_as_long_as_the_teachers_heads_look_back():
    """Beside attention written out: rotary queries and keys, a softmax, and the mean of the logarithms."""
    teacher = teacher_of("llama", max_position_embeddings=128, initializer_range=1.0)  # or attention would be even
    model = build_student(teacher, StudentConfig.parse({"layout": "kda_only"}))
    assert teacher.config._attn_implementation == "sdpa"
    input_ids = repeated_tokens(teacher.config.vocab_size, 128, torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden_states = teacher.model.layers[0].input_layernorm(teacher.model.embed_tokens(input_ids))
        attention = teacher.model.layers[0].self_attn
        cos, sin = teacher.model.rotary_emb(hidden_states, torch.arange(128)[None])
        query, key = (
            getattr(attention, name)(hidden_states).unflatten(-1, (-1, 16)).transpose(1, 2)
            for name in ("q_proj", "k_proj")
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
    distances = []
    for head in range(4):
        logarithms, weight = 0.0, 0.0
        for place in range(16, 128):
            scores = query[0, head, place] @ key[0, head // 2, : place + 1].T / 4
            for other, share in enumerate(scores.softmax(0).tolist()[1:], start=1):
                logarithms += share * math.log(max(place - other, 1))
                weight += share
        distances.append(math.exp(logarithms / weight))
        found = memory(model.model.layers[0].self_attn)[head]
        torch.testing.assert_close(found, torch.full((16,), distances[-1]), rtol=1e-3, atol=0)
    assert max(distances) > 1.2 * min(distances) > 2.4


def test_a_teacher_that_tells_no_weights_is_left_as_it_was(monkeypatch):
    teacher = teacher_of("llama")
    attention = teacher.model.layers[2].self_attn
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *args, **kwargs: (forward(*args, **kwargs)[0], None))
    with pytest.raises(UserError, match="memory: attended needs attention weights"):
        build_student(teacher, StudentConfig())
    assert teacher.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in teacher.modules())


def test_the_way_memory_begins_leaves_all_other_random_numbers_as_they_are():
    spread, attended = (first_layer("llama", initialization={"memory": kind})[1] for kind in ("spread", "attended"))
    assert torch.equal(spread.f_proj[0].weight, attended.f_proj[0].weight)
    assert not torch.equal(spread.dt_bias, attended.dt_bias)


@pytest.mark.parametrize("lower_bound", [-5.0, -1.0, None])
def test_memory_is_as_asked_for_with_and_without_safe_gate(lower_bound):
    _, kda = first_layer("llama")
    kda.gate_lower_bound = lower_bound
    asked = torch.linspace(2, 1000, 64)
    set_memory(kda, asked)
    torch.testing.assert_close(memory(kda).flatten(), asked, rtol=1e-3, atol=0)


def test_fitted_scale_brings_the_output_closer_to_the_teachers():
    """On other tokens than those it was fitted on."""
    errors = {}
    for scale in ("default", "fitted"):
        teacher = teacher_of("llama")
        model = build_student(teacher, StudentConfig.parse({"initialization": {"output_scale": scale}}))
        with torch.no_grad():
            hidden_states = teacher.model.layers[0].input_layernorm(teacher.model.embed_tokens(token_ids(4, 64)))
            positions = teacher.model.rotary_emb(hidden_states, torch.arange(64)[None])
            theirs, _ = teacher.model.layers[0].self_attn(hidden_states, position_embeddings=positions)
            ours, _ = model.model.layers[0].self_attn(hidden_states)
        errors[scale] = ((ours - theirs).square().sum() / theirs.square().sum()).item()
    assert errors["fitted"] < 1.01 < errors["default"] / 2  # 1 is the error of an output of zero


@pytest.mark.parametrize("seed", [0, 1])
def test_every_parameter_of_a_new_layer_is_set(seed):
    """Memory that was laid out but not written may hold anything."""
    initialization = {"short_convolution": "default"}
    _, kda = first_layer("llama", seed=seed, initialization=initialization)
    _, again = first_layer("llama", seed=seed, initialization=initialization)
    for (name, one), other in zip(kda.named_parameters(), again.parameters(), strict=True):
        assert one.isfinite().all(), name
        assert torch.equal(one, other), name
