"""Decoding token by token: one graph, states at fixed addresses, and the kernels of a step against plain PyTorch."""

import pytest
import torch
from transformers import StaticCache
from transformers.generation import CompileConfig

from distillkit.student.network.delta_rule import log_decay, recurrent_kda
from distillkit.student.network.kda_attention import GatedRMSNorm, convolution_step

from .students import FULL, KDA, LAYOUTS, student, tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def whole_graph():
    """No step is left out of it: a break raises."""
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_step_of_a_static_cache_is_one_graph(layout, family):
    model = student(family, layout)
    text = tokens(2, 7)
    mask = torch.ones_like(text)
    mask[0, :3] = 0
    for attention_mask in (mask, torch.ones_like(text)):
        options = {"attention_mask": attention_mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        expected = model.generate(text, use_cache=False, **options)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        static = model.generate(text, cache_implementation="static", compile_config=whole_graph(), **options)
        assert torch.equal(static, expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # the second step needs no other one


@pytest.mark.parametrize("layout", [[KDA, FULL], [KDA, KDA]], ids=["hybrid", "kda_only"])
@torch.no_grad()
def test_states_of_a_static_cache_stay_where_they_are(layout):
    model = student(layout=layout)
    cache = StaticCache(model.config, max_cache_len=32)
    first = model(tokens(1, 5), past_key_values=cache).logits
    places = [state.data_ptr() for state in (cache.layers[0].conv_state, cache.layers[0].recurrent_state)]
    model(tokens(1, 1), past_key_values=cache)
    assert int(cache.get_seq_length()) == 6
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    torch.testing.assert_close(model(tokens(1, 5), past_key_values=cache).logits, first)
    assert places == [state.data_ptr() for state in (cache.layers[0].conv_state, cache.layers[0].recurrent_state)]


@torch.no_grad()
def test_prompts_in_pieces_and_beams_with_a_static_cache():
    model = student(layout=[KDA, FULL])
    text = tokens(2, 11)
    mask = torch.ones_like(text)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    for extra in ({"prefill_chunk_size": 4}, {"num_beams": 3}):
        static = model.generate(text, cache_implementation="static", **options, **extra)
        assert torch.equal(static, model.generate(text, **options, **extra))


@pytest.mark.gpu
@pytest.mark.parametrize("lower_bound", [-5.0, None], ids=["safe gate", "plain gate"])
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["expanded", "grouped"])
@pytest.mark.parametrize(("head_dim", "conv_size"), [(64, 4), (96, 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@torch.no_grad()
def test_kernels_of_a_step_equal_plain_pytorch(dtype, tolerance, head_dim, conv_size, kv_heads, lower_bound):
    """Output and both states, after a prompt and several steps; the kernels' own rounding alone differs."""
    from distillkit.student.network.step_kernels import kda_step

    torch.manual_seed(0)
    heads, rows = 4, 3
    channels = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]

    def random(*shape, scale=1.0):
        return (scale * torch.randn(*shape)).to(DEVICE, dtype)

    weights = [random(size, conv_size) for size in channels]
    A_log, dt_bias, norm_weight = (random(size).float() for size in (heads, heads * head_dim, head_dim))
    conv_state, state = random(rows, conv_size - 1, sum(channels)), random(rows, heads, head_dim, head_dim).float()
    found_conv, found_state = conv_state.clone(), state.clone()
    norm = GatedRMSNorm(head_dim).to(DEVICE)
    norm.weight.copy_(norm_weight)
    for _ in range(3):
        projected = [random(rows, 1, size) for size in channels]
        decay_gate, gate = random(rows, 1, heads * head_dim, scale=3.0), random(rows, 1, heads * head_dim)
        beta_gate = random(rows, 1, heads)
        found = kda_step(
            projected,
            weights,
            decay_gate,
            beta_gate,
            gate,
            found_conv,
            found_state,
            A_log=A_log,
            dt_bias=dt_bias,
            norm_weight=norm_weight,
            norm_eps=norm.eps,
            head_dim=head_dim,
            lower_bound=lower_bound,
        )
        joined, conv_state = convolution_step(torch.cat(projected, dim=-1), torch.cat(weights), conv_state)
        query, key, value = (each.unflatten(-1, (-1, head_dim)) for each in joined.split(channels, dim=-1))
        key, value = (each.repeat_interleave(heads // kv_heads, dim=-2) for each in (key, value))
        decay = log_decay(decay_gate.unflatten(-1, (-1, head_dim)), A_log, dt_bias, lower_bound)
        output, state = recurrent_kda(query, key, value, decay, beta_gate.float().sigmoid(), state)
        expected = norm(output, gate.unflatten(-1, (-1, head_dim))).flatten(-2)
        for one, other in ((found, expected), (found_state, state)):
            assert (one.float() - other.float()).norm() < tolerance * other.float().norm()
        assert torch.equal(found_conv, conv_state)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_on_a_gpu_a_static_cache_gives_the_tokens_of_eager_decoding(layout):
    """In float32, padded, as CUDA graphs of what inductor compiles."""
    model = student("llama", layout, config_changes={"head_dim": 64}).cuda()
    text = tokens(2, 70).cuda()
    mask = torch.ones_like(text)
    mask[0, :9] = 0
    options = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
    graph = model.generate(text, cache_implementation="static", **options)
    assert torch.equal(graph, model.generate(text, **options))
