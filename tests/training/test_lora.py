"""An adapter of low rank: it alone trains, is saved for peft, and is in the student that is saved."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distillkit.config import UserError
from distillkit.config.lora import LoraConfig
from distillkit.planning import plan_run
from distillkit.training.lora import add_adapter, merge_adapter
from distillkit.training.precision import cast_for_training
from tests.training.test_distill import configuration, run
from tests.training.tiny import BYTES, llama, save_inputs, save_llama

LORA = {"rank": 4, "alpha": 6, "target_modules": ["q_proj", "v_proj", "mlp.up_proj"]}
TRAINED = 2 * 4 * ((32 + 32) + (32 + 16) + (32 + 64))
"""Two layers; A and B of queries, values of grouped heads, and the wider MLP."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return {**save_inputs(folder), "student": save_llama(folder / "student", 1)}


def described(inputs, folder, training=None, **changes):
    options = {"max_steps": 6, "save_steps": 3, "logging_steps": 1, **(training or {})}
    return configuration(inputs, folder, options, **{"lora": LORA, "frozen_res": [], **changes})


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = described(inputs, folder)
    plan = plan_run(config, gpu="cpu").phases[0]
    with pytest.MonkeyPatch.context() as patch:  # room for the student and two adapters, not for two students more
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(250_000, 0, 250_000))
        return folder, run(config), plan


def test_the_student_is_its_weights_and_the_adapter(inputs, finished):
    folder, _, _ = finished
    results = json.loads((folder / "results.json").read_text())
    assert results["parameters"]["trained"] == TRAINED
    assert results["divergence"]["after"]["kl"] < results["divergence"]["before"]["kl"]
    student, before = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, inputs["student"]))
    trained = load_file(folder / "adapter/adapter_model.safetensors")
    for name, tensor in before.named_parameters():
        part = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        low, high = (trained.get(f"{part}{which}.weight") for which in "AB")
        expected = tensor if low is None else tensor + 6 / 4 * high @ low
        torch.testing.assert_close(student.get_parameter(name), expected, rtol=0, atol=1e-6)
    assert len(trained) == 2 * 2 * 3 and all(tensor.any() for tensor in trained.values())


def test_peft_loads_the_adapter(inputs, finished):
    folder, _, _ = finished
    student = AutoModelForCausalLM.from_pretrained(folder)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(inputs["student"]), folder / "adapter")
    assert adapted.peft_config["default"].base_model_name_or_path == inputs["student"]
    ids = torch.randint(3, BYTES, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, student(ids).logits, rtol=0, atol=1e-5)


def test_a_checkpoint_has_the_adapter_alone_and_is_resumed_exactly(inputs, finished, tmp_path):
    whole, _, _ = finished
    folder = shutil.copytree(whole, tmp_path / "run")
    assert not (folder / "checkpoint-3/model.safetensors").exists()
    shutil.rmtree(folder / "checkpoint-6")
    for path in (folder / "model.safetensors", folder / "results.json"):
        path.unlink()
    run(described(inputs, folder, resume=True))
    ours, theirs = (load_file(each / "model.safetensors") for each in (folder, whole))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_the_plan_counts_the_adapter(finished):
    _, _, plan = finished
    assert sum(trained for _, trained in plan.groups.values()) == TRAINED
    assert plan.cost.memory["gradients"] == 4 * TRAINED
    assert plan.disk.checkpoint == (4 + 8) * TRAINED


def test_an_adapter_on_a_head_of_any_name_is_refused():
    settings = LoraConfig.parse(LORA).model_copy(update={"target_modules": ["q_proj", "lm_head"]})
    with pytest.raises(UserError, match=r"^lora\.target_modules\[1\]: the losses read its weight itself"):
        add_adapter(llama(1), settings, "nowhere")


def test_an_adapter_is_merged_in_float32():
    """Into 16-bit weights, most of these updates would be rounded away."""
    student = llama(1)
    adapter, _ = add_adapter(student, LoraConfig.parse(LORA), "nowhere")
    cast_for_training(student, torch.bfloat16)
    layer = student.model.layers[0].self_attn.v_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=1e-3)
    expected = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    merge_adapter(adapter)
    merged = student.model.layers[0].self_attn.v_proj.weight
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)


def test_a_converted_student_in_bfloat16_trains_an_adapter(inputs, tmp_path):
    teacher = {"kind": "hf", "path": save_llama(tmp_path / "teacher", 2, layers=4)}
    training = {"max_steps": 2, "save_steps": 1, "bf16": True, "gradient_checkpointing": True}
    asked = {"model": None, "student": {"layout": "hybrid"}, "teacher": teacher, "lora": {"rank": 2}}
    said = run(described(inputs, tmp_path / "run", training, **asked))
    assert "trained 1,984 parameters for 2 steps" in said  # 2 × (3 layers of 4 × 64, one with grouped heads)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert student.config.mixers == ["kda", "kda", "kda", "full"]
    untrained = load_file(tmp_path / "run/untrained/model.safetensors")
    parameters = dict(student.named_parameters())
    changed = {name for name, each in parameters.items() if not torch.equal(each, untrained[name].to(each.dtype))}
    assert all("_proj" in name for name in changed) and any("q_proj" in name for name in changed)
    shutil.rmtree(tmp_path / "run/untrained")
    (tmp_path / "run/results.json").unlink()
    with pytest.raises(
        UserError, match=r"^lora: the checkpoint's adapter belongs to the student in .* is missing; bri"
    ):
        run(described(inputs, tmp_path / "run", training, resume=True, **asked))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"frozen_res": ["mlp"]}, r"frozen_res: has no effect with lora"),
        ({"parallel": {}}, r"lora: an adapter is not divided over GPUs"),
        ({"lora": {"target_modules": ["lm_head"]}}, r"lora\.target_modules\[0\]: the losses read the weight"),
        (
            {"lora": {"target_modules": ["q_proj", "nothing"]}},
            r"lora\.target_modules\[1\]: 'nothing' names no linear layer",
        ),
    ],
)
def test_what_cannot_be_is_refused(inputs, tmp_path, changes, problem):
    with pytest.raises(UserError, match=f"^{problem}"):
        run(described(inputs, tmp_path / "run", **changes))


def test_an_adapter_of_another_rank_is_not_resumed(inputs, finished, tmp_path):
    whole, _, _ = finished
    folder = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(folder / "checkpoint-6")
    (folder / "results.json").unlink()
    with pytest.raises(UserError, match=r"^lora\.rank: is 8, but the run in .* was started with 4"):
        run(described(inputs, folder, resume=True, lora={**LORA, "rank": 8}))
