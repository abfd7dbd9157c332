"""Products in float8 are those of rows that are rounded to float8 and back, forward and backward."""

import pytest
import torch
from torch import nn

from distillkit.config import UserError
from distillkit.models.float8 import (
    FLOAT8,
    Float8Linear,
    check_float8,
    exchange,
    float8_layers,
    frozen_in_float8,
    quantize_rows,
)
from distillkit.training.freezing import freeze
from distillkit.training.precision import cast_for_training
from tests.training.tiny import llama

BF16 = torch.bfloat16


def rounded(x):
    """Each row by its own scale, to e4m3 and back, in float32."""
    scale = x.float().abs().amax(-1, keepdim=True) / 448
    return (x.float() / scale).to(FLOAT8).float() * scale


def linear(inputs=64, outputs=96, bias=False, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-2, 2, outputs)[:, None])  # outputs of unequal size
    return layer.to(BF16).requires_grad_(False)


def frozen_student(patterns=(r"\.mlp\.",), **options):
    model = llama(0, **options)
    freeze(model, patterns)
    cast_for_training(model, BF16)
    return model


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_rounded_rows(bias):
    layer, x = linear(bias=bias), torch.randn(2, 5, 64, dtype=BF16)
    wanted = rounded(x) @ rounded(layer.weight).T
    if bias:
        wanted = wanted.to(BF16) + layer.bias
    found = Float8Linear(layer, keep=False)(x)
    assert found.dtype == BF16 and found.shape == (2, 5, 96)
    torch.testing.assert_close(found.float(), wanted.float(), rtol=2**-7, atol=1e-2)
    exact = layer(x).float()
    error = (found.float() - exact).norm(dim=(0, 1)) / exact.norm(dim=(0, 1))
    assert error.max() < 0.08  # of each output, however small


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_the_inputs_gradient_is_that_of_a_rounded_weight_and_of_a_gradient_rounded_with_its_scales(dtype):
    layer = linear()
    x = torch.randn(7, 64, dtype=dtype, requires_grad=True)
    gradient = torch.randn(7, 96, dtype=BF16) * 1e-12  # as small as those of a mean over a million tokens
    numbers, scale = quantize_rows(layer.weight)
    wanted = rounded(gradient * scale.T) @ numbers.float()
    Float8Linear(layer, keep=False)(x).backward(gradient)
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad.float(), wanted, rtol=2**-7, atol=wanted.abs().max().item() * 1e-3)
    exact = gradient.float() @ layer.weight.float()
    assert (x.grad.float() - exact).norm() / exact.norm() < 0.05


def test_zeros_stay_zeros_and_infinity_is_seen():
    layer, x = linear(), torch.zeros(3, 64, dtype=BF16)
    x[1, 4] = torch.inf
    found = Float8Linear(layer, keep=False)(x)
    assert (found[[0, 2]] == 0).all() and found[1].isnan().all()


def test_compiled_it_is_the_same_and_keeps_no_second_copy_of_a_weight():
    layers = [Float8Linear(linear(64, 96), keep=False), Float8Linear(linear(96, 64, seed=1), keep=False)]

    def mlp(x):
        return layers[1](layers[0](x).relu().square())

    kept = []
    x = torch.randn(7, 64, dtype=BF16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        found = torch.compile(mlp, backend="aot_eager")(x)
    assert torch.equal(found, mlp(x))
    pointers = {each.numbers.data_ptr() for each in layers}
    assert {each.data_ptr() for each in kept if each.dtype == FLOAT8} == pointers
    gradients = [torch.autograd.grad(output.sum(), x)[0] for output in (found, mlp(x))]
    assert torch.equal(*gradients)


def test_frozen_linear_layers_are_exchanged_and_come_back_bit_for_bit():
    model = frozen_student([r"\.mlp\.", r"layers\.1\.self_attn\.o_proj", "lm_head"])
    before, layers = (
        {name: each.clone() for name, each in model.state_dict().items()},
        float8_layers(model, "frozen_precision"),
    )
    parts = {f"model.layers.{index}.mlp.{part}_proj" for index in (0, 1) for part in ("gate", "up", "down")}
    assert layers.keys() == {*parts, "model.layers.1.self_attn.o_proj"}  # not the head
    said = []
    with frozen_in_float8(model, said.append):
        exchanged = {name for name, each in model.named_modules() if isinstance(each, Float8Linear)}
        assert exchanged == layers.keys()
        within = model.state_dict()
        assert {*dict(model.named_parameters())} == {
            name for name in before if name.removesuffix(".weight") not in layers and name != "lm_head.weight"
        }
        assert within.keys() == before.keys()
        assert all(torch.equal(within[name], each) for name, each in before.items())
    assert said == ["float8: 7 frozen linear layers compute in it (13,312 weights); all others as before"]
    assert all(model.get_submodule(name) is each for name, each in layers.items())
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_layers_that_train_or_have_odd_sizes_or_share_weights_stay():
    model = frozen_student([r"mlp\.up_proj", r"mlp\.down_proj"], tied=False)
    layers = model.model.layers
    layers[0].mlp.up_proj = nn.Linear(32, 72, dtype=BF16).requires_grad_(False)
    layers[1].mlp.up_proj.weight = layers[1].mlp.gate_proj.weight.requires_grad_(False)
    found = set(float8_layers(model, "frozen_precision"))
    assert found == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    model._keep_in_fp32_modules_strict = {"0"}
    assert set(float8_layers(model, "frozen_precision")) == {"model.layers.1.mlp.down_proj"}


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"^frozen_precision: there is no frozen linear layer but the head with"):
        exchange(frozen_student(["norm"]), "frozen_precision")
    with pytest.raises(UserError, match=r"^teacher\.quantization: model\.layers\.0\.self_attn\.q_proj is not in mem"):
        exchange(llama(0).requires_grad_(False).to("meta"), "teacher.quantization")
    check_float8(torch.device("cpu"), "frozen_precision", "remove it")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "A100")
    for found in ((8, 0), (8, 9)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device, found=found: found)
        if found == (8, 9):
            check_float8(torch.device("cuda"), "frozen_precision", "remove it")
            continue
        with pytest.raises(UserError, match=r"^frozen_precision: float8 needs a GPU of compute capability 8\.9 or hi"):
            check_float8(torch.device("cuda"), "frozen_precision", "remove it")


@pytest.mark.gpu
def test_a_gpu_computes_the_product_of_rounded_rows():
    """Not beside a CPU's: in PyTorch 2.11, which the GPU's machine may have, a CPU knows no scales of rows."""
    layer, x = linear(256, 384), torch.randn(40, 256, dtype=BF16)
    wanted = rounded(x) @ rounded(layer.weight).T
    numbers, scale = quantize_rows(layer.weight)
    gradient = rounded(torch.ones(40, 384) * scale.T) @ numbers.float()
    there = x.cuda().requires_grad_()
    found = Float8Linear(layer.cuda(), keep=False)(there)
    torch.testing.assert_close(found.cpu().float(), wanted, rtol=2**-6, atol=wanted.abs().max().item() * 1e-2)
    found.sum().backward()
    torch.testing.assert_close(there.grad.cpu().float(), gradient, rtol=2**-6, atol=gradient.abs().max().item() * 1e-2)


def test_a_cpu_whose_pytorch_multiplies_no_rows_is_refused(monkeypatch):
    check_float8(torch.device("cpu"), "frozen_precision", "remove it")

    def no_rows(*given, **options):
        raise RuntimeError("Now _scaled_mm only supports per-tensor scaling")

    monkeypatch.setattr(torch, "_scaled_mm", no_rows)
    with pytest.raises(UserError, match=r"^frozen_precision: PyTorch .* has no float8 products .* remove it$"):
        check_float8(torch.device("cpu"), "frozen_precision", "remove it")
