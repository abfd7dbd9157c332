"""What is frozen is what the patterns say, under every name that a tensor has."""

import pytest
from torch import nn

from distillkit.config.errors import UserError
from distillkit.training.freezing import freeze
from tests.training.tiny import llama


def frozen_names(model):
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def test_expressions_are_searched_for_in_parameter_names():
    model = llama(0, tied=False)
    freeze(model, [r"norm\.weight", r"^model\.layers\.[0-9]+\.mlp\..*"])
    expected = {name for name, _ in model.named_parameters() if "norm.weight" in name or ".mlp." in name}
    assert frozen_names(model) == expected


def test_modules_are_frozen_with_all_that_they_hold():
    model = llama(0, tied=False)
    freeze(model, frozen_modules=["model.layers.1"])
    assert frozen_names(model) == {name for name, _ in model.named_parameters() if ".layers.1." in name}


@pytest.mark.parametrize("settings", [{"frozen_res": ["lm_head"]}, {"frozen_modules": ["lm_head"]}])
def test_a_head_that_shares_the_embeddings_freezes_them(settings):
    model = llama(0, tied=True)
    result = freeze(model, **settings)
    assert frozen_names(model) == {"model.embed_tokens.weight"}
    assert result.frozen == model.lm_head.weight.numel()
    assert result.shared_with_frozen == [("lm_head.weight", "model.embed_tokens.weight")]


def test_what_a_former_run_froze_is_trained_again():
    model = llama(0).requires_grad_(False)
    result = freeze(model, ["embed_tokens"])
    assert frozen_names(model) == {"model.embed_tokens.weight"}
    assert result.trainable + result.frozen == model.num_parameters()


def test_a_pattern_without_a_match_is_named_with_names_that_exist():
    with pytest.raises(
        UserError, match=r"frozen_res\[1\]: 'self_atn' matches no parameter.*model\.embed_tokens\.weight"
    ):
        freeze(llama(0), ["embed_tokens", "self_atn"])


def test_a_module_that_does_not_exist_is_named():
    with pytest.raises(UserError, match=r"frozen_modules\[0\]: there is no module 'mlp'.*model\.layers\.0"):
        freeze(llama(0), frozen_modules=["mlp"])


def test_freezing_everything_is_refused():
    with pytest.raises(UserError, match="nothing is left to train"):
        freeze(nn.Linear(2, 2), ["."])
