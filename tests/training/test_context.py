"""What cannot work on rows that are divided is refused: it would take a part for the whole, and nobody would see."""

import pytest
import torch
import transformers

from distillkit.config import UserError
from distillkit.config.parallel import ParallelConfig
from distillkit.models.divided_rows import DividedRows, divided_attention, set_divided_rows, whole_rows
from distillkit.models.varlen_attention import varlen_attention
from distillkit.training.arguments import build_training_arguments
from distillkit.training.context import context_of, divide_rows_of
from tests.student.students import student

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("Falcon", {}, "attention of its own code"),
        ("MiniMax", {"num_local_experts": 2, "head_dim": 8}, "its linear_attention"),
        (
            "Qwen3Next",
            {"num_experts": 2, "layer_types": ["linear_attention", "full_attention"]},
            "its linear_attention",
        ),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type dynamic"),
        ("Phi3", {"rope_parameters": LONGROPE}, "rope_type longrope"),
    ],
)
def test_models_that_would_take_a_part_for_the_whole_are_refused(name, options, problem):
    config = getattr(transformers, f"{name}Config")(**SHAPE, **options)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with pytest.raises(UserError, match=rf"^teacher\.path: {name}ForCausalLM with {problem} cannot work on rows"):
        divide_rows_of(model, "teacher.path")


class OneProcess(DividedRows):
    processes = 1

    def _exchange(self, sent):
        assert sent.dtype == torch.bfloat16
        return sent


def test_what_is_exchanged_is_in_the_dtype_that_attention_computes_in():
    """Beside float32 masters, position embeddings make float32 of queries and keys."""
    query, key, value = torch.randn(3, 1, 2, 6, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16), whole_rows():
        alone, _ = varlen_attention(torch.nn.Module(), query, key, value.bfloat16(), None)
        set_divided_rows(OneProcess(None, torch.arange(6).unsqueeze(0)))
        divided, _ = divided_attention(torch.nn.Module(), query, key, value.bfloat16(), None)
    assert torch.equal(divided, alone)


def test_students_of_mixers_and_full_attention_are_not():
    model = student()
    divide_rows_of(model, "model")
    assert model.config._attn_implementation == "divided"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("train_sampling_strategy", "batch_rebalance"),
        ("train_sampling_strategy", "group_by_length"),
        ("accelerator_config", {"use_seedable_sampler": False}),
    ],
)
def test_data_loading_that_may_give_processes_different_rows_is_refused(option, value, tmp_path, monkeypatch):
    arguments, _ = build_training_arguments({option: value}, tmp_path, uses_logits=True)
    monkeypatch.setattr(ParallelConfig, "sizes", lambda *_: (1, 2))
    with pytest.raises(UserError, match=rf"^training_args\.{option}: does not give the processes"):
        context_of(ParallelConfig(context=2), arguments)
