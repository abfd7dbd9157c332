"""Layouts hold their promise for any number of layers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distillkit.config import StudentConfig, UserError
from distillkit.conversion.layouts import layer_mixers


def full_layers(num_layers: int, **student) -> list[int]:
    mixers = layer_mixers(num_layers, StudentConfig.parse(student))
    assert len(mixers) == num_layers
    return [index for index, mixer in enumerate(mixers) if mixer == "full"]


def test_hybrid_keeps_the_last_of_each_four():
    assert full_layers(36) == [3, 7, 11, 15, 19, 23, 27, 31, 35]
    assert full_layers(30) == [3, 7, 11, 15, 19, 23, 27]
    assert full_layers(3) == []


def test_front_loaded_at_36_layers_has_four_in_front_and_five_spread():
    assert full_layers(36, layout="front_loaded") == [0, 1, 2, 3, 9, 15, 22, 28, 35]


def test_front_loaded_with_few_full_layers_puts_all_in_front():
    assert full_layers(12, layout="front_loaded") == [0, 1, 2]
    assert full_layers(16, layout="front_loaded") == [0, 1, 2, 3]
    assert full_layers(2, layout="front_loaded") == []


@given(st.integers(min_value=1, max_value=200))
def test_front_loaded_has_as_many_full_layers_as_hybrid_evenly_spread(num_layers: int):
    front_loaded = full_layers(num_layers, layout="front_loaded")
    assert len(front_loaded) == len(full_layers(num_layers, layout="hybrid"))
    assert front_loaded[:4] == list(range(min(4, len(front_loaded))))
    gaps = [after - before for before, after in zip(front_loaded[3:], front_loaded[4:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_kda_only_has_none():
    assert full_layers(36, layout="kda_only") == []


def test_explicit_layers_stand_in_any_order():
    assert full_layers(12, full_attention_layers=[11, 3]) == [3, 11]
    assert full_layers(12, full_attention_layers=[]) == []


def test_a_layer_that_the_teacher_does_not_have_is_named():
    with pytest.raises(UserError, match=r"full_attention_layers\[1\]: layer 12 does not exist.*are 0 to 11"):
        full_layers(12, full_attention_layers=[3, 12])
