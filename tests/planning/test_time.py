"""How long a step takes: its work, or the time in which a processor starts its kernels."""

import pytest
import torch

from distillkit.planning import plan_run
from distillkit.planning.gpus import find_gpu, seconds
from tests.planning.small import ATTENTION, run, teacher_folder, text_file

H100 = find_gpu("H100")


def step(flops, *, attention=0.0, hidden_size=2560, **others):
    return seconds(flops, attention, H100, hidden_size, torch.bfloat16, **{"trained_layers": 36, **others})


def test_a_small_step_takes_as_long_as_its_kernels_to_start_and_a_large_one_as_its_work():
    assert step(1e9) == step(2e9) > 0.3
    assert step(2e15) == pytest.approx(2 * step(1e15))
    assert step(1e9, trained_layers=18) == step(1e9) / 2


def test_compiled_work_is_quicker_and_its_kernels_start_no_sooner():
    assert step(1e15, compiled=True) < step(1e15) / 1.5
    assert step(1e9, compiled=True) == step(1e9)
    narrow, wide = (step(1e15, compiled=True, hidden_size=size) for size in (576, 2560))
    assert narrow > 2 * wide


def test_products_in_float8_are_quicker_where_they_are_compiled():
    assert step(1e15, float8=1e15) == step(1e15)
    whole, half = (step(1e15, float8=share * 1e15, compiled=True) for share in (1, 0.5))
    assert step(1e15, compiled=True) == pytest.approx(1.5 * whole) == pytest.approx(2 * half - whole)


def test_softmax_attention_takes_a_share_of_its_own():
    assert step(1e15, attention=1e15) == step(1e15, attention=1e15, compiled=True)


def test_steps_as_measured_at_real_shapes():
    """AFM-4.5B's 36 layers, compiled, on an H100: one row of 32,768 tokens and four of 2,048 (throughput.json)."""
    assert step(1546.4e12, attention=420.6e12, compiled=True) == pytest.approx(3.95, rel=0.05)  # its work
    assert step(244.6e12, attention=5.8e12, compiled=True) == pytest.approx(0.619, rel=0.05)  # starting its kernels


def test_a_larger_batch_of_a_small_model_costs_nothing_unless_only_attention_runs(tmp_path):
    teacher, text = teacher_folder(tmp_path / "teacher"), text_file(tmp_path)

    def speed(rows, **keys):
        arguments = {"per_device_train_batch_size": rows}
        return plan_run(run(teacher, text, arguments=arguments, **keys), gpu="H100").phases[0].tokens_per_second

    assert speed(4) == pytest.approx(2 * speed(2))
    assert speed(4, losses=ATTENTION) == pytest.approx(speed(2, losses=ATTENTION), rel=0.05)
