"""The mixer of docs/adding_a_mixer.md, made by the page's own code, in all that a student does."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import distillkit.student.mixers.registry as registry
import distillkit.student.network.mixers as network
from distillkit.config import StudentConfig, UserError
from distillkit.conversion import build_student, summarize
from distillkit.evaluation.speed import cache_bytes
from distillkit.planning import plan_run
from distillkit.student.mixers.registry import mixed_layers
from distillkit.training import distill
from tests.conversion.teachers import teacher_of, token_ids
from tests.pages import blocks
from tests.training.tiny import save_inputs

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_mixer.md"


@pytest.fixture
def page(monkeypatch):
    """What the page's code defines, with its mixer in the tables as long as the test lasts."""
    for table in (network.MIXERS, registry.MIXERS):
        monkeypatch.setitem(table, "mean", None)
    names: dict = {}
    for code in blocks(PAGE, "python"):
        exec(code, names)
    return names


def student(**options):
    return build_student(teacher_of("llama"), StudentConfig.parse({"mixer": "mean", **options})).eval()


def reference(layer, hidden_states):
    """Token by token: the mean of the values up to it."""
    values = layer.v_proj(hidden_states)
    means = [values[:, : index + 1].mean(1) for index in range(values.shape[1])]
    return layer.o_proj(torch.stack(means, dim=1))


def test_the_layer_is_what_the_page_says(page):
    layer = student().model.layers[0].self_attn
    assert type(layer) is page["RunningMean"]
    hidden_states = torch.randn(2, 9, 48)
    torch.testing.assert_close(layer(hidden_states)[0], reference(layer, hidden_states))


def test_one_token_at_a_time_packed_and_padded_rows_give_the_same_logits(page):
    model = student()
    ids = token_ids(batch=2)
    with torch.no_grad():
        expected = model(ids).logits
        cache, steps = None, []
        for token in ids.split(1, dim=1):
            output = model(token, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), expected)
        positions = torch.arange(ids.shape[1]).repeat(2).unsqueeze(0)
        packed = model(ids.reshape(1, -1), position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed.reshape(expected.shape), expected)
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        padded = model(ids, attention_mask=mask).logits[1, 3:]
        torch.testing.assert_close(padded, model(ids[1:, 3:]).logits[0])


def test_the_summary_counts_it(page):
    model = student()
    summary = summarize(teacher_of("llama"), model)
    assert [layer.mixer for layer in summary.layers] == ["mean"] * 3 + ["full attention, NoPE"]
    assert summary.memory[0].student_state == 3 * (8 + 48 * 4)
    assert [type(mixer).__name__ for _, mixer in mixed_layers(model)] == ["RunningMeanMixer"] * 3 + ["FullAttention"]


def test_it_trains_and_loads_again(page, tmp_path):
    model = student(layout="kda_only").train()
    model(token_ids(batch=2), labels=token_ids(batch=2)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.mixers == ["mean"] * 4
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)


def test_a_run_plans_trains_evaluates_and_describes_it(page, tmp_path):
    """What the page promises: `plan`, the run, `evaluate` and the model card know the mixer."""
    inputs = save_inputs(tmp_path / "inputs")
    recipe = {
        "student": {"mixer": "mean", "full_attention_layers": [1]},
        "teacher": {"kind": "hf", "path": inputs["teacher"]},
        "output_path": str(tmp_path / "run"),
        "sequence_length": 64,
        "dataset": {"train_dataset": {"disk_path": inputs["text"]}},
        "training_args": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "use_cpu": True},
    }
    groups = plan_run(recipe, gpu="h100").phases[0].groups
    folder = distill(recipe, Console(quiet=True))
    student = AutoModelForCausalLM.from_pretrained(folder)
    assert student.config.mixers == ["mean", "full"]
    mean = student.model.layers[0].self_attn
    assert groups["mean"][0] == sum(parameter.numel() for parameter in mean.parameters())
    untrained = AutoModelForCausalLM.from_pretrained(folder / "untrained")
    assert not torch.equal(mean.v_proj.weight, untrained.model.layers[0].self_attn.v_proj.weight)
    card = (folder / "README.md").read_text()
    assert "mean in place of softmax attention in 1 of the 2 layers" in card
    assert "mean in layers 0" in card and "full attention in layers 1, without positions" in card
    with torch.no_grad():
        cache = student(torch.zeros(2, 9, dtype=torch.long), use_cache=True).past_key_values
    assert cache_bytes(cache)["state_bytes"] == 2 * registry.MIXERS["mean"].state_bytes(mean)


@pytest.mark.parametrize("name", ["mean", "full", "KDA"])
def test_a_mixer_that_is_not_there_is_named(name):
    with pytest.raises(UserError, match=rf"student.mixer: must be one of kda, got '{name}'"):
        student(mixer=name)
