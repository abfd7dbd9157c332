"""The student as transformers sees it: caching, padding, packing, generation, saving."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from distillkit.student.network import KDAHybridConfig, KDAHybridForCausalLM, KimiDeltaAttention
from distillkit.student.network.kda_attention import short_convolution

from .students import FAMILIES, FULL, KDA, LAYOUTS, base_config, student, tokens

EVERYWHERE = [(family, layout) for family in FAMILIES for layout in LAYOUTS]


@pytest.mark.parametrize(("family", "layout"), EVERYWHERE)
@torch.no_grad()
def test_cached_logits_equal_uncached(family, layout):
    model = student(family, layout)
    ids = tokens(2, 90)
    expected = model(ids, use_cache=False).logits
    for prefill in (1, 70):  # then a piece of several tokens, then token by token
        output = model(ids[:, :prefill], use_cache=True)
        pieces = [output.logits]
        for start, end in [(prefill, prefill + 9), *((t, t + 1) for t in range(prefill + 9, min(prefill + 20, 90)))]:
            output = model(ids[:, start:end], past_key_values=output.past_key_values, use_cache=True)
            pieces.append(output.logits)
        cached = torch.cat(pieces, dim=1)
        torch.testing.assert_close(cached, expected[:, : cached.shape[1]], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("family", "layout"), EVERYWHERE)
@torch.no_grad()
def test_padded_rows_equal_rows_alone(family, layout):
    model = student(family, layout)
    lengths = [7, 70, 23]
    rows = [tokens(1, length, seed=length) for length in lengths]
    for side in ("left", "right"):
        ids, mask = torch.zeros(3, 70, dtype=torch.long), torch.zeros(3, 70, dtype=torch.long)
        places = [slice(70 - n, None) if side == "left" else slice(n) for n in lengths]
        for row, place in enumerate(places):
            ids[row, place], mask[row, place] = rows[row][0], 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for row, place in enumerate(places):
            torch.testing.assert_close(padded[row, place], model(rows[row]).logits[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_left_padded_generation_equals_rows_alone(layout):
    model = student(layout=layout)
    rows = [tokens(1, 5), tokens(1, 11, seed=1)]
    ids = torch.cat([torch.zeros(1, 6, dtype=torch.long), rows[0]], dim=1)
    ids = torch.cat([ids, rows[1]])
    together = model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=12, do_sample=False)
    for row, alone in enumerate(rows):
        expected = model.generate(alone, max_new_tokens=12, do_sample=False)
        assert together[row, -12:].tolist() == expected[0, -12:].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_beam_search_with_a_cache_equals_beam_search_without(layout):
    model = student(layout=layout)
    ids = tokens(2, 9)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "num_beams": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize(("family", "layout"), EVERYWHERE)
def test_packed_documents_equal_documents_alone(family, layout):
    """Logits and gradients; boundaries as restarting positions and as cu_seqlens."""
    model = student(family, layout)
    documents = [tokens(1, length, seed=length) for length in (3, 70, 1, 26)]

    def weighted(logits):
        return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()

    alone = torch.cat([model(ids, use_cache=False).logits for ids in documents], dim=1)
    weighted(alone).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in documents]).unsqueeze(0)
    cu_seqlens = torch.tensor([0, 3, 73, 74, 100])
    for boundaries in ({"position_ids": positions}, {"cu_seqlens": cu_seqlens}):
        model.zero_grad()
        packed = model(torch.cat(documents, dim=1), use_cache=False, **boundaries).logits
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-4)
        weighted(packed).backward()
        for name, parameter in model.named_parameters():
            # k_proj.bias of NoPE attention moves all scores of a query alike: its gradient is zero but for rounding.
            error = (parameter.grad - expected[name]).norm() / (expected[name].norm() + 1e-3 * total)
            assert error < 1e-3, f"{name}: relative error {error:.1e}"


def test_packed_rows_of_a_batch():
    model = student()
    ids = tokens(2, 40)
    positions = torch.cat([torch.arange(25), torch.arange(15)]).repeat(2, 1)
    packed = model(ids, position_ids=positions, use_cache=False).logits
    for piece in (slice(25), slice(25, 40)):
        torch.testing.assert_close(packed[:, piece], model(ids[:, piece]).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_state_has_the_same_size_after_10_and_after_1000_tokens(layout):
    model = student(layout=layout)
    sizes = []
    for length in (10, 1000):
        cache = model(tokens(1, length), use_cache=True).past_key_values
        assert cache.get_seq_length() == length
        layers = [cache.layers[i] for i, kind in enumerate(LAYOUTS[layout]) if kind == KDA]
        sizes.append([(layer.conv_state.numel(), layer.recurrent_state.numel()) for layer in layers])
        assert all(layer.conv_state.untyped_storage().nbytes() == layer.conv_state.nbytes for layer in layers)
    assert sizes[0] == sizes[1] == [(3 * 3 * 64, 4 * 16 * 16)] * len(sizes[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_saved_student_loads_with_the_package(layout, tmp_path):
    model = student(layout=layout, config_changes={"tie_word_embeddings": layout == "kda_only"})
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, KDAHybridForCausalLM)
    assert torch.equal(loaded(tokens(1, 20)).logits, model(tokens(1, 20)).logits)


@torch.no_grad()
def test_saved_student_loads_without_the_package(tmp_path):
    model = student(config_changes={"tie_word_embeddings": True})
    model.save_pretrained(tmp_path / "student")
    ids = tokens(1, 20)
    torch.save(ids, tmp_path / "ids.pt")
    script = (
        "import sys, torch; sys.modules['distillkit'] = None\n"  # any import of the package fails
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('student', trust_remote_code=True)\n"
        "torch.save(model(torch.load('ids.pt')).logits.detach(), 'logits.pt')\n"
        "model.generate(torch.load('ids.pt'), max_new_tokens=2)\n"
        "model.save_pretrained('again')\n"
    )
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1", "PATH": ""}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, capture_output=True)
    expected = model(ids).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-6)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids).logits, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_checkpointing_changes_no_gradient(layout):
    gradients = []
    for checkpointing in (False, True):
        model = student(layout=layout).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = tokens(2, 30)
        model(
            ids, position_ids=torch.cat([torch.arange(20), torch.arange(10)]).unsqueeze(0), labels=ids
        ).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_compiled_layers_give_the_same_logits():
    torch.manual_seed(0)
    model = KDAHybridForCausalLM(KDAHybridConfig(base_config(num_hidden_layers=2), [KDA, FULL])).eval()
    ids = tokens(1, 30)
    positions = torch.cat([torch.arange(20), torch.arange(10)]).unsqueeze(0)
    expected = [model(ids, use_cache=False).logits, model(ids, position_ids=positions, use_cache=False).logits]
    for layer in model.model.layers:
        layer.compile(backend="eager")
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected[0])
    torch.testing.assert_close(model(ids, position_ids=positions, use_cache=False).logits, expected[1])


@torch.no_grad()
def test_bfloat16_is_close_to_float32():
    model = student()
    ids = tokens(1, 60)
    expected = model(ids).logits
    logits = model.to(torch.bfloat16)(ids).logits
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).norm() / expected.norm() < 0.03


@torch.no_grad()
def test_grouped_heads_repeat_the_outputs_of_the_key_value_heads():
    grouped = student(kv_heads="grouped")
    expanded = student(kv_heads="expand")
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if name.endswith(("k_proj.weight", "v_proj.weight", "k_conv1d.weight", "v_conv1d.weight")):
            layer = int(name.split(".")[2])
            if LAYOUTS["hybrid"][layer] == KDA:
                heads = weight.unflatten(0, (2, 16)).repeat_interleave(2, dim=0)
                weights[name] = heads.flatten(0, 1)
    expanded.load_state_dict(weights)
    ids = tokens(1, 20)
    torch.testing.assert_close(grouped(ids).logits, expanded(ids).logits)


@torch.no_grad()
def test_all_layers_full_with_rope_is_the_teacher_exactly():
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(base_config()).eval()
    model = KDAHybridForCausalLM(KDAHybridConfig(base_config(), [FULL] * 4, use_rope=True)).eval()
    model.load_state_dict(teacher.state_dict())
    ids = tokens(2, 20)
    assert torch.equal(model(ids).logits, teacher(ids).logits)
    nope = KDAHybridForCausalLM(KDAHybridConfig(base_config(), [FULL] * 4, use_rope=False)).eval()
    nope.load_state_dict(teacher.state_dict())
    assert not torch.allclose(nope(ids).logits, teacher(ids).logits, atol=1e-3)


@torch.no_grad()
def test_full_attention_without_rope_sees_a_set_not_a_sequence():
    """NoPE: exchanging two earlier tokens changes nothing for the last one, in a single layer."""
    config = KDAHybridConfig(base_config(num_hidden_layers=1), [FULL])
    torch.manual_seed(0)
    model = KDAHybridForCausalLM(config).eval()
    ids = tokens(1, 10)
    exchanged = ids[:, [1, 0, *range(2, 10)]]
    torch.testing.assert_close(model(ids).logits[:, -1], model(exchanged).logits[:, -1])


def test_parameter_names_and_shapes_are_those_of_flash_linear_attention():
    layer = KimiDeltaAttention(hidden_size=48, num_heads=4, num_kv_heads=4, head_dim=16, layer_idx=0)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {
        "A_log": (4,),
        "dt_bias": (64,),
        "q_proj.weight": (64, 48),
        "k_proj.weight": (64, 48),
        "v_proj.weight": (64, 48),
        "q_conv1d.weight": (64, 1, 4),
        "k_conv1d.weight": (64, 1, 4),
        "v_conv1d.weight": (64, 1, 4),
        "f_proj.0.weight": (16, 48),
        "f_proj.1.weight": (64, 16),
        "b_proj.weight": (4, 48),
        "g_proj.0.weight": (16, 48),
        "g_proj.1.weight": (64, 16),
        "g_proj.1.bias": (64,),
        "o_norm.weight": (16,),
        "o_proj.weight": (48, 64),
    }


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"position_ids": torch.arange(5).repeat(2).unsqueeze(0), "use_cache": True}, "use_cache=False"),
        ({"cu_seqlens": torch.tensor([0, 5, 10])}, "use_cache=False"),
        ({"cu_seqlens": torch.tensor([0, 5, 10]), "attention_mask": torch.ones(1, 10)}, "no attention_mask"),
    ],
)
def test_packed_rows_refuse_what_would_hide_their_boundaries_from_full_attention(inputs, message):
    with pytest.raises(ValueError, match=message):
        student()(tokens(1, 10), **inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_types": [KDA] * 3}, "3 entries for 4 layers"),
        ({"layer_types": [KDA] * 3 + ["sliding"]}, "sliding"),
        ({"mixers": ["kda"] * 3 + ["mamba"]}, r"mixers: \['mamba'\] are none of \['full', 'kda'\]"),
        ({"mixers": ["kda"] * 4, "layer_types": [KDA] * 3 + ["full_attention"]}, "not those of the mixers"),
        ({"kv_heads": "shared"}, "kv_heads: 'shared'"),
        ({"gate_lower_bound": -6.0}, r"gate_lower_bound: -6.0 is not in \[-5, 0\)"),
    ],
)
def test_configuration_refuses_what_it_cannot_build(options, message):
    with pytest.raises(ValueError, match=message):
        KDAHybridConfig(base_config(), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_token_is_convolved_as_in_its_sequence(dtype):
    x, weight = torch.randn(2, 9, 6, dtype=dtype), torch.randn(6, 4, dtype=dtype)
    expected, last = short_convolution(x, weight, None, None)
    state, outputs = None, []
    for token in x.split(1, dim=1):
        output, state = short_convolution(token, weight, state, None)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected)
    assert torch.equal(state, last)


@pytest.mark.parametrize("kv_heads", ["expand", "grouped"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_a_file_lacks_is_initialised(tmp_path, family, kv_heads):
    """Not what the memory held before; what the file has stays."""
    config = KDAHybridConfig(base_config(family), layer_types=LAYOUTS["hybrid"], kv_heads=kv_heads)
    model = KDAHybridForCausalLM(config)
    kept = {name: value for name, value in model.state_dict().items() if "layers.0." not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    with torch.device("meta"):
        raw = KDAHybridForCausalLM(config)
    raw.to_empty(device="cpu")
    for parameter in raw.parameters():
        parameter.data.fill_(torch.nan)
    raw.init_weights()
    loaded = KDAHybridForCausalLM.from_pretrained(tmp_path)
    for each in (raw, loaded):
        assert all(parameter.isfinite().all() for parameter in each.parameters())
        assert each.model.layers[0].self_attn.A_log.eq(0).all()
        assert 0 < each.model.layers[0].self_attn.q_conv1d.weight.abs().max() <= 0.5
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in kept.items())
    trained = loaded.model.layers[0].self_attn.A_log.data.fill_(3)
    loaded.init_weights()
    assert trained.eq(3).all()
