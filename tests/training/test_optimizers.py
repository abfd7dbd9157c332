"""Optimizers that lose no small update: right on average, the same on every rank and after every interruption."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from distillkit.config import UserError
from distillkit.runs.names import COMPLETE, WRITING
from distillkit.training.optimizers import (
    StochasticAdamW,
    describe,
    lossy_accumulation,
    noise_of,
    protect_updates,
    round_stochastically,
)
from distillkit.training.precision import cast_for_training
from tests.training.test_distill import configuration, run
from tests.training.tiny import VOCAB, llama, save_llama, save_text

LOW_BIT = ["adamw_torch_8bit", "adamw_torch_4bit"]
ROUNDING = ["adamw_torch", *LOW_BIT]


def make_optimizer(optim, parameters, **options):
    """As Trainer makes it."""
    chosen = torch.optim.AdamW
    if optim in LOW_BIT:
        from torchao.optim import AdamW4bit, AdamW8bit

        chosen = {"adamw_torch_8bit": AdamW8bit, "adamw_torch_4bit": AdamW4bit}[optim]
    chosen, options = protect_updates(optim, chosen, options, parameters)
    return chosen(parameters, **options)


def gradients_of(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.floats(-1e4, 1e4, width=32).filter(lambda number: abs(number) > 1e-30))
@settings(max_examples=50, deadline=None)
def test_rounding_goes_to_a_neighbour_and_is_right_on_average(number):
    exact = torch.full((4096,), number)
    rounded = round_stochastically(exact, noise_of(torch.Generator().manual_seed(0), 4096))
    assert rounded.dtype == torch.bfloat16
    bits = exact[:1].view(torch.int32) >> 16 << 16
    nearer_to_zero, farther = (each.view(torch.float32).double() for each in (bits, bits + 2**16))
    values = rounded.double()
    assert torch.all((values == nearer_to_zero) | ((values == farther) & (nearer_to_zero != number)))
    # 4096 coin tosses between two neighbours: their mean is within five standard deviations.
    assert abs(values.mean() - number) <= 5 * (farther - nearer_to_zero).abs() / 2 / math.sqrt(4096)


def test_what_is_not_finite_stays_so():
    """The first is CUDA's NaN, all of whose low bits are set."""
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, 0x7F800000, -0x800000], dtype=torch.int32).repeat_interleave(1000)
    exact = bits.view(torch.float32)
    rounded = round_stochastically(exact, noise_of(torch.Generator().manual_seed(0), 5000))
    assert torch.all(rounded[:3000].isnan())
    assert torch.equal(rounded[3000:].float(), exact[3000:])


@pytest.mark.parametrize("slice_size", [7, 2**24])
def test_float32_weights_are_updated_as_by_adamw(monkeypatch, slice_size):
    monkeypatch.setattr("distillkit.training.optimizers.SLICE", slice_size)
    ours, theirs = (nn.Parameter(gradients_of(0, (5, 6))) for _ in range(2))
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizers = StochasticAdamW([ours], **options), torch.optim.AdamW([theirs], **options)
    for step in range(20):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradients_of(step, (5, 6))
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optim", ROUNDING)
def test_updates_too_small_for_bf16_add_up(optim):
    """400 steps of 1e-5 are 0.004, the distance of a weight of 1 from its lower neighbour in bf16."""
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    unprotected = nn.Parameter(weight.detach().clone())
    optimizers = make_optimizer(optim, [weight], lr=1e-5, weight_decay=0.0), torch.optim.AdamW([unprotected], lr=1e-5)
    for _ in range(400):
        for parameter, optimizer in zip((weight, unprotected), optimizers, strict=True):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    assert torch.all(unprotected == 1)
    assert weight.float().mean().item() == pytest.approx(0.996, abs=3e-4)
    bits = {"adamw_torch_8bit": 8, "adamw_torch_4bit": 4}.get(optim)
    assert bits is None or f"{bits}bit" in type(optimizers[0].state[weight]["exp_avg"]).__name__


def test_the_second_moment_follows_gradients_that_shrink():
    """Rounded to nearest, a bf16 running mean of squares at beta2 = 0.999 would stay where it is."""
    weight = nn.Parameter(torch.ones(32, 32, dtype=torch.bfloat16))
    optimizer = StochasticAdamW([weight], lr=1e-5, betas=(0.9, 0.999))
    exact = torch.zeros(())
    for step in range(1500):
        size = 1.0 if step < 500 else 0.1
        weight.grad = torch.full_like(weight, size)
        exact = exact.lerp(weight.grad[0, 0].float().square(), 1e-3)
        optimizer.step()
    assert exact < 0.2
    assert optimizer.state[weight]["exp_avg_sq"].float().mean().item() == pytest.approx(exact.item(), rel=0.02)


@pytest.mark.parametrize("optim", ROUNDING)
def test_a_step_does_not_depend_on_other_random_numbers_and_leaves_them_alone(optim):
    """Ranks of a data-parallel run drop out differently, and must stay one model."""
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = make_optimizer(optim, [weight], lr=1e-3)
        for step in range(3):
            weight.grad = gradients_of(step, (64, 64)).bfloat16()
            before = torch.get_rng_state()
            optimizer.step()
            assert torch.equal(torch.get_rng_state(), before)
        weights.append(weight)
    assert torch.equal(*weights)


def test_each_step_rounds_anew():
    weight = nn.Parameter(torch.full((64, 64), 0.02, dtype=torch.bfloat16))
    optimizer = StochasticAdamW([weight], lr=1e-5, weight_decay=0.0)
    moved = []
    for _ in range(2):
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        moved.append(weight != before)
    assert all(0 < each.float().mean() < 0.5 for each in moved)
    assert not torch.equal(*moved)


def test_an_optimizer_that_cannot_round_is_given_no_bf16_weight():
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    with pytest.raises(
        UserError, match=r"training_args\.optim: sgd loses small updates of bfloat16 weights; use adamw"
    ):
        protect_updates("sgd", torch.optim.SGD, {}, [weight])


def error_of_a_bf16_sum(addends):
    """Of equal numbers between 1 and 2, relative to their sum."""
    numbers = (1 + torch.rand(20_000, generator=torch.Generator().manual_seed(0))).bfloat16()
    total = torch.zeros_like(numbers)
    for _ in range(addends):
        total += numbers
    exact = addends * numbers.double()
    return ((total.double() - exact).norm() / exact.norm()).item()


def test_gradients_added_up_in_bf16_are_warned_of_where_more_than_a_hundredth_is_lost():
    halved, whole = (nn.Parameter(torch.ones(2, 2, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    in_bf16, in_float32 = (make_optimizer("adamw_torch", [weight]) for weight in (halved, whole))
    for micro_batches in (1, 8, 16, 24, 32, 64):
        warned = lossy_accumulation(in_bf16, micro_batches) is not None
        assert warned == (error_of_a_bf16_sum(micro_batches) > 0.01)
        assert lossy_accumulation(in_float32, micro_batches) is None


def test_adamw_by_its_plain_name_is_not_fused_on_a_cpu():
    weight = nn.Parameter(torch.ones(2, 2))
    assert describe(make_optimizer("adamw_torch", [weight])) == "optimizer: AdamW, float32 weights"


@pytest.mark.gpu
def test_adamw_by_its_plain_name_is_fused_on_cuda():
    weight = nn.Parameter(torch.ones(2, 2, device="cuda"))
    assert describe(make_optimizer("adamw_torch", [weight])) == "optimizer: AdamW, fused, float32 weights"


@pytest.mark.gpu
@pytest.mark.parametrize("optim", ROUNDING)
def test_rounding_on_cuda_follows_from_the_step(optim):
    if optim in LOW_BIT:
        pytest.importorskip("torchao")
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        weight = nn.Parameter(torch.full((64, 64), 0.02, dtype=torch.bfloat16, device="cuda"))
        optimizer = make_optimizer(optim, [weight], lr=1e-5, weight_decay=0.0)
        for _ in range(200):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        weights.append(weight)
    assert torch.equal(*weights)
    assert weights[0].float().mean().item() == pytest.approx(0.018, rel=0.02)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "teacher": save_llama(folder / "teacher", 0, hidden_size=64),
        "student": save_llama(folder / "student", 1, hidden_size=64, attention_dropout=0.1),
        "text": save_text(folder / "train.jsonl"),
        "held_out": save_text(folder / "valid.jsonl", documents=10),
    }


@pytest.mark.parametrize("optim", [*ROUNDING, "float32 adamw_torch_8bit"])
def test_a_run_says_its_protection_and_resumes_exactly(inputs, tmp_path, optim):
    trained_weights = {} if optim.startswith("float32") else {"trained_weights": "bfloat16"}
    training = {"bf16": True, "optim": optim.removeprefix("float32 "), "max_steps": 4, "save_steps": 2}
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    said = run(configuration(inputs, undisturbed, training, evaluation=None, **trained_weights))
    assert "added up in bfloat16" not in said
    if trained_weights:
        assert "parameters train in bfloat16, rounded stochastically" in said
        assert "bfloat16 weights rounded stochastically" in said
    else:
        assert "float32 master weights under bfloat16 autocast" in said
        assert "optimizer: AdamW8bit, float32 weights" in said
    # What a run leaves that was killed after step 2: its later files are gone.
    shutil.copytree(undisturbed, stopped)
    for name in ("results.json", "model.safetensors"):
        (stopped / name).unlink()
    (stopped / "checkpoint-4" / COMPLETE).rename(stopped / "checkpoint-4" / WRITING)
    assert "resuming after step 2" in run(
        configuration(inputs, stopped, training, evaluation=None, resume=True, **trained_weights)
    )
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (stopped, undisturbed))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_run_warns_of_a_sum_of_many_gradients_in_bf16(inputs, tmp_path):
    training = {"bf16": True, "max_steps": 1, "gradient_accumulation_steps": 24}
    said = run(configuration(inputs, tmp_path, training, evaluation=None, trained_weights="bfloat16"))
    assert "trained_weights: the gradients of 24 micro-batches are added up in bfloat16, which rounds away" in said


def held_out_loss_of_200_steps(optim, weights, compute):
    """At learning rate 1e-5, on rows that count up in ones or twos; the loss on other such rows."""
    generator = torch.Generator().manual_seed(0)
    start, stride = (torch.randint(*bounds, (80, 1), generator=generator) for bounds in ((VOCAB,), (1, 3)))
    rows = (start + stride * torch.arange(17)) % VOCAB
    student = llama(0, layers=1, hidden_size=64)
    cast_for_training(student, compute, weights)
    trained = list(student.parameters())
    optimizer = (
        torch.optim.AdamW(trained, lr=1e-5) if optim == "unprotected" else make_optimizer(optim, trained, lr=1e-5)
    )

    def loss(some_rows):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute == torch.bfloat16):
            logits = student(some_rows[:, :-1]).logits
        return F.cross_entropy(logits.float().flatten(0, 1), some_rows[:, 1:].flatten())

    for step in range(200):
        first = 4 * (step % 16)
        loss(rows[first : first + 4]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss(rows[64:]).item()


def test_200_steps_in_bf16_end_as_in_float32_and_without_protection_do_not():
    full = held_out_loss_of_200_steps("adamw_torch", torch.float32, torch.float32)
    masters = held_out_loss_of_200_steps("adamw_torch", torch.float32, torch.bfloat16)
    rounded = held_out_loss_of_200_steps("adamw_torch", torch.bfloat16, torch.bfloat16)
    in_8_bits = held_out_loss_of_200_steps("adamw_torch_8bit", torch.bfloat16, torch.bfloat16)
    unprotected = held_out_loss_of_200_steps("unprotected", torch.bfloat16, torch.bfloat16)
    for protected in (masters, rounded, in_8_bits):
        assert protected == pytest.approx(full, rel=0.01)
    assert unprotected > 1.03 * full
