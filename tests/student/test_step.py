"""Decoding token by token: one graph, states at fixed addresses, and the kernels of a step against plain PyTorch."""

import pytest
import torch
from transformers import StaticCache
from transformers.generation import CompileConfig

from distillkit.student.network import kda_attention
from distillkit.student.network.cache import RecurrentCacheLayer
from distillkit.student.network.kda_attention import KimiDeltaAttention

from .students import FULL, KDA, LAYOUTS, student, tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def whole_graph():
    """No step is left out of it: a break raises."""
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize(("family", "layers"), [("llama", [KDA, FULL]), ("llama", [KDA, KDA]), ("qwen3", [FULL, KDA])])
@torch.no_grad()
def test_a_step_of_a_static_cache_is_one_graph(family, layers):
    """Of left-padded rows; the second step needs no other graph, nor does a longer prompt."""
    model = student(family, layers)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for length in (7, 9):
        text = tokens(2, length)
        mask = torch.ones_like(text)
        mask[0, :3] = 0
        options = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        static = model.generate(
            text, cache_implementation="static", max_cache_len=32, compile_config=whole_graph(), **options
        )
        assert torch.equal(static, model.generate(text, use_cache=False, **options))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


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
@pytest.mark.parametrize("rows", [1, 19, 70])
@pytest.mark.parametrize(
    ("head_dim", "changes"),
    [
        (64, {}),
        (96, {"conv_size": 3, "qkv_bias": True}),
        (128, {"gate_lower_bound": None, "num_kv_heads": 2}),
    ],
    ids=["head 64", "head 96, biases, 3 taps", "head 128, plain gate, grouped"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@torch.no_grad()
def test_kernels_of_a_step_equal_plain_pytorch(dtype, tolerance, head_dim, changes, rows, monkeypatch):
    """Output and both states after several steps; the order of summation alone differs."""
    from distillkit.student.network.step_kernels import kda_step

    torch.manual_seed(0)
    arguments = {"hidden_size": 200, "num_heads": 4, "num_kv_heads": 4, "head_dim": head_dim, "layer_idx": 0}
    layer = KimiDeltaAttention(**{**arguments, **changes})
    for parameter in (layer.A_log, layer.dt_bias, layer.o_norm.weight):
        torch.nn.init.normal_(parameter)
    layer.f_proj[1].weight.mul_(10)  # some forget at once, some remember for long
    layer = layer.to(DEVICE, dtype)
    monkeypatch.setattr(kda_attention, "STEP_KERNELS", False)
    cache = RecurrentCacheLayer(static=True)
    channels = sum(conv.weight.shape[0] for conv in (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d))
    past = layer.q_conv1d.weight.shape[-1] - 1
    cache.store(
        torch.randn(rows, past, channels, device=DEVICE, dtype=dtype),
        torch.randn(rows, 4, head_dim, head_dim, device=DEVICE),
    )
    states = [cache.conv_state.clone(), cache.recurrent_state.clone()]
    for _ in range(3):
        x = torch.randn(rows, 1, 200, device=DEVICE, dtype=dtype)
        found, expected = kda_step(layer, x, *states), layer._step(x, cache)
        for one, other in ((found, expected), (states[0], cache.conv_state), (states[1], cache.recurrent_state)):
            assert one.dtype == other.dtype
            assert (one.double() - other.double()).norm() < tolerance * other.double().norm()


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
