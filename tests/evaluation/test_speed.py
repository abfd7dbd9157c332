"""What is remembered is counted on the cache itself, and a step of a KDA student costs the same at every length."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distillkit.config.evaluate import SpeedConfig
from distillkit.evaluation.generation import prefill
from distillkit.evaluation.speed import cache_bytes, measure_speed

from ..student.students import LAYOUTS, student, tokens
from ..training.tiny import llama

SETTINGS = SpeedConfig.parse({"decode_tokens": 4, "repeats": 2, "batch_size": 3, "prefill_tokens": 50})


class Elements(TorchDispatchMode):
    """Counts what the operations within it write."""

    written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.written += sum(x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor))
        return result


def written_by_a_step(model, context):
    _, cache = prefill(model, tokens(1, context) % 97, 1000)
    with Elements() as elements, torch.no_grad():
        model(input_ids=tokens(1, 1) % 97, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return elements.written


def test_a_step_of_a_kda_student_costs_the_same_at_every_length():
    model = student(layout="kda_only")
    assert written_by_a_step(model, 64) == written_by_a_step(model, 2000)
    teacher = llama(0)
    assert written_by_a_step(teacher, 2000) > 4 * written_by_a_step(teacher, 64)  # it copies its cache


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cache_is_weighed(layout):
    """Four heads of 16 by 16 float32, three inputs of 3 × 64 channels; keys and values of two heads of 16 a token."""
    rows = [measure_speed(student(layout=layout), SETTINGS, context) for context in (60, 120)]
    full = LAYOUTS[layout].count("full_attention")
    for row in rows:
        assert row["kv_cache_bytes"] == 3 * full * row["context"] * 2 * 2 * 16 * 4
        assert row["state_bytes"] == 3 * (4 - full) * (4 * 16 * 16 + 3 * 3 * 64) * 4


def test_a_view_keeps_all_that_it_is_a_view_of():
    _, cache = prefill(llama(0), tokens(1, 60) % 97, 100)
    whole = cache_bytes(cache)
    cache.layers[0].keys = cache.layers[0].keys[:, :, :1]
    assert cache_bytes(cache) == whole


def test_a_row_holds_what_was_asked():
    model = llama(0, tied=True)
    row = measure_speed(model, SETTINGS, 60)
    assert row["context"] == 60 and row["peak_bytes"] is None
    assert row["prefill_tokens_per_second"] == pytest.approx(3 * 60 / row["time_to_first_token_seconds"])
    assert row["decode_tokens_per_second"] > 0
    parameters = 4 * sum(parameter.numel() for parameter in model.parameters())  # a tied head is counted once
    buffers = sum(buffer.nbytes for buffer in {id(b): b for b in model.buffers()}.values())
    assert row["weights_bytes"] == parameters + buffers


@pytest.mark.gpu
def test_peak_memory_on_cuda():
    model = student(layout="kda_only").cuda()
    rows = [measure_speed(model, SETTINGS, context) for context in (64, 4096)]
    assert all(row["peak_bytes"] > row["weights_bytes"] for row in rows)
    assert rows[0]["state_bytes"] == rows[1]["state_bytes"] > 0 == rows[1]["kv_cache_bytes"]
