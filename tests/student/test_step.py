"""Decoding token by token: one graph, states at fixed addresses, and the kernels of a step against plain PyTorch."""

from pathlib import Path

import pytest
import torch
from transformers import StaticCache
from transformers.dynamic_module_utils import get_imports
from transformers.generation import CompileConfig

from distillkit.student import network
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


@pytest.mark.parametrize("layout", [[KDA, FULL], [KDA, KDA]], ids=["hybrid", "kda_only"])
@torch.no_grad()
def test_prompts_in_pieces_and_beams_with_a_static_cache(layout):
    """Also where steps are compiled, and where a piece of a padded prompt is as short as a step."""
    model = student(layout=layout)
    text = tokens(2, 11)
    mask = torch.ones_like(text)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(text, **options)
    compiled = {"cache_implementation": "static", "compile_config": whole_graph()}
    for piece in (1, 4, 10):
        assert torch.equal(model.generate(text, prefill_chunk_size=piece, **compiled, **options), expected)
    beams = model.generate(text, num_beams=3, cache_implementation="static", **options)
    assert torch.equal(beams, model.generate(text, num_beams=3, **options))


@torch.no_grad()
def test_a_cache_of_another_model_is_taken_over_or_refused():
    text = tokens(1, 6)
    first, second = student(layout=[KDA, FULL, KDA, FULL]), student(layout=[KDA, KDA, KDA, FULL], use_rope=True)
    cache = StaticCache(first.config, max_cache_len=16)
    first(text, past_key_values=cache)
    cache.reset()
    for start in range(0, 6, 2):
        found = second(text[:, start : start + 2], past_key_values=cache).logits
    torch.testing.assert_close(found, second(text).logits[:, 4:])
    with pytest.raises(ValueError, match="layer 1 holds states, and is full here"):
        first(text, past_key_values=cache)
    cache.reset()
    third = student(layout="kda_only")
    for length in (4, 2):
        third(text[:, :length], past_key_values=cache)
    assert int(cache.get_seq_length()) == 6


@torch.no_grad()
def test_a_cache_that_was_reset_takes_another_number_of_rows():
    model = student(layout=[KDA, KDA])
    cache = model(tokens(2, 5)).past_key_values
    cache.reset()
    torch.testing.assert_close(model(tokens(3, 5), past_key_values=cache).logits, model(tokens(3, 5)).logits)


def test_files_of_the_network_need_nothing_that_a_cpu_lacks():
    """transformers looks for what the files beside a student import before it runs them."""
    for file in Path(network.__path__[0]).glob("*.py"):
        assert "triton" not in get_imports(file)


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
