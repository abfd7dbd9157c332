"""Hidden states as they appear in a real decoder."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distillkit.models.hidden_states import HiddenStateTaps

LAYERS = 3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).double()


@pytest.fixture
def ids():
    return torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(0))


def test_indices_are_those_of_transformers(model, ids):
    with HiddenStateTaps(model.get_decoder(), range(LAYERS + 1)) as taps:
        expected = model(ids, output_hidden_states=True).hidden_states
    assert sorted(taps.states) == list(range(LAYERS + 1))
    for index, states in taps.states.items():
        assert torch.equal(states, expected[index])


def test_without_the_final_norm_the_last_is_the_layers_own_output(model, ids):
    with HiddenStateTaps(model.get_decoder(), [LAYERS], final_norm=False) as taps:
        normed = model(ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(model.model.norm(taps.states[LAYERS]), normed)
    assert not torch.allclose(taps.states[LAYERS], normed)


def test_only_what_is_asked_for_is_kept_and_each_pass_starts_anew(model, ids):
    with HiddenStateTaps(model.get_decoder(), [1]) as taps:
        model(ids)
        first = taps.states[1]
        model(ids.flip(1))
        assert list(taps.states) == [1] and not torch.equal(taps.states[1], first)
    model(ids)
    assert not torch.equal(taps.states[1], first), "outside the block nothing is recorded"


def test_an_index_that_does_not_exist_is_refused(model):
    with pytest.raises(ValueError, match="hidden state 4 does not exist: the model has 0 to 3"):
        HiddenStateTaps(model.get_decoder(), [4])


def gradients_of_tapped_states(model, ids):
    with HiddenStateTaps(model.get_decoder(), range(LAYERS + 1), final_norm=False) as taps:
        model(ids)
        loss = sum((index + 1) * states.pow(3).sum() for index, states in taps.states.items())
        # Inside the block, so that a recomputing layer meets its hook again.
        return torch.autograd.grad(loss, list(model.get_decoder().parameters()), allow_unused=True)


def test_gradients_under_checkpointing_equal_those_without(model, ids):
    model.train()
    expected = gradients_of_tapped_states(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        checkpointed = gradients_of_tapped_states(model, ids)
    finally:
        model.gradient_checkpointing_disable()
    for gradient, other in zip(checkpointed, expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_compiled_layers_are_tapped_in_every_pass_of_one_block(model, ids):
    expected = [model(ids, output_hidden_states=True).hidden_states[2], model(ids + 1 - 1).logits]
    compiled = LlamaForCausalLM(model.config).double()
    compiled.load_state_dict(model.state_dict())
    with HiddenStateTaps(compiled.get_decoder(), [2]) as taps:
        for layer in compiled.get_decoder().layers:
            layer.compile(backend="eager")
        for _ in range(3):
            logits = compiled(ids).logits
            torch.testing.assert_close(taps.states[2], expected[0])
        torch.testing.assert_close(logits, expected[1])
