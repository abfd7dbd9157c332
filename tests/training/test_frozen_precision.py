"""Frozen layers in float8 while a run trains, and as they were in all that it writes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from distillkit.config import RunConfig, UserError
from distillkit.config.resolve import resolve
from distillkit.models import float8
from distillkit.models.float8 import Float8Linear
from distillkit.planning import plan_run
from distillkit.training.distiller import Distiller
from tests.training.captures import run
from tests.training.tiny import save_inputs

MLP = r"\.mlp\."


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_inputs(tmp_path_factory.mktemp("inputs"))


def configuration(inputs, folder, training=None, **changes):
    described = {
        "student": {"full_attention_layers": [1]},
        "teacher": {"path": inputs["teacher"]},
        "output_path": str(folder),
        "sequence_length": 64,
        "dataset": {"train_dataset": {"disk_path": inputs["text"]}},
        "frozen_res": [MLP],
        "frozen_precision": "float8",
        "loss_functions": [{"function": "kl", "weight": 1.0}],
        "training_args": {
            "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "bf16": True,
            "use_cpu": True, **(training or {}),
        },
    }  # fmt: skip
    return RunConfig.parse({**described, **changes})


def weights(folder):
    return load_file(folder / "model.safetensors")


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines() if "loss" in line]


@pytest.fixture
def exchanged(monkeypatch):
    """Names of the layers that were in float8 in each micro-batch."""
    forward, seen = Distiller.forward, []

    def watched(self, *args, **kwargs):
        seen.append({name for name, each in self.student.named_modules() if isinstance(each, Float8Linear)})
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Distiller, "forward", watched)
    return seen


def test_what_is_saved_is_what_a_run_without_it_saves(inputs, tmp_path, exchanged):
    checkpoints = {"save_strategy": "steps", "save_steps": 1, "gradient_checkpointing": True}
    said = run(configuration(inputs, tmp_path / "float8", checkpoints))
    assert "float8: 6 frozen linear layers compute in it" in said
    assert len(exchanged) == 2 and all(len(each) == 6 and all(".mlp." in name for name in each) for each in exchanged)
    run(configuration(inputs, tmp_path / "without", checkpoints, frozen_precision=None))
    assert exchanged[2:] == [set(), set()]
    assert losses(tmp_path / "float8") == pytest.approx(losses(tmp_path / "without"), rel=0.02)
    assert losses(tmp_path / "float8") != losses(tmp_path / "without")
    for place in (".", "checkpoint-1"):
        found, wanted = (weights(tmp_path / name / place) for name in ("float8", "without"))
        assert {name: each.dtype for name, each in found.items()} == {name: each.dtype for name, each in wanted.items()}
        frozen = [name for name in wanted if MLP.replace("\\", "") in name]
        assert len(frozen) == 6 and all(torch.equal(found[name], wanted[name]) for name in frozen)
        assert not all(torch.equal(found[name], wanted[name]) for name in wanted)  # what trains sees the rounding
    report = (tmp_path / "float8" / "report.html").read_text()
    assert "frozen linear layers computed in float8" in report


def test_a_resumed_run_is_the_run_and_a_later_phase_trains_the_weights_as_they_were(inputs, tmp_path, exchanged):
    phases = [
        {"name": "frozen", "training_args": {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}},
        {"name": "all", "frozen_res": [], "frozen_precision": None, "training_args": {"learning_rate": 0.0}},
    ]
    run(configuration(inputs, tmp_path / "run", phases=phases))
    assert [len(each) for each in exchanged] == [6, 6, 0, 0]
    folder = tmp_path / "run" / "phases" / "1-frozen"
    wanted, untrained = weights(folder), weights(folder / "untrained")
    for name, each in weights(tmp_path / "run").items():
        assert torch.equal(each, wanted[name].to(each.dtype)), name
        assert MLP.replace("\\", "") not in name or torch.equal(each, untrained[name].to(each.dtype)), name

    single = configuration(inputs, tmp_path / "single", {"save_strategy": "steps", "save_steps": 1})
    run(single)
    (tmp_path / "single" / "results.json").unlink()
    (tmp_path / "single" / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "single" / "checkpoint-2")
    run(configuration(inputs, tmp_path / "single", {"save_strategy": "steps", "save_steps": 1}, resume=True))
    assert len(exchanged) == 7
    assert all(torch.equal(each, wanted[name].to(each.dtype)) for name, each in weights(tmp_path / "single").items())


def test_the_plan_counts_its_memory_and_its_work(inputs, tmp_path):
    shape = {"student": {"full_attention_layers": [1]}}
    plans = {}
    for kind in (None, "float8"):
        config = configuration(inputs, tmp_path, frozen_precision=kind, **shape)
        plans[kind] = plan_run(config, gpu="H100").phases[0].cost
    numbers, outputs = 2 * 3 * 32 * 64, 2 * (64 + 64 + 32)
    memory = [each.memory["student weights"] for each in plans.values()]
    assert memory[0] - memory[1] == numbers - 4 * outputs
    assert plans[None].float8_flops == 0
    assert plans["float8"].float8_flops == 2 * (2 * numbers) * 2 * 64  # both directions, of 128 tokens
    assert plans["float8"].flops == plans[None].flops
    plan = plan_run(configuration(inputs, tmp_path), gpu="A100-80GB")
    assert plan.errors[0].startswith("frozen_precision: float8 needs a GPU of compute capability 8.9 or higher")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"training": {"bf16": False}}, r"frozen_precision: float8 needs training_args\.bf16: true; set it"),
        ({"parallel": {}}, r"frozen_precision: float8 weights are not divided over GPUs; remove parallel, or this"),
        ({"frozen_precision": "float16"}, r"frozen_precision: "),
        ({"frozen_res": []}, r"frozen_precision: float8 is for what is frozen, and all is trained; freeze some"),
    ],
)
def test_what_cannot_be_is_refused(inputs, tmp_path, changes, problem):
    with pytest.raises(UserError, match=f"^{problem}"):
        configuration(inputs, tmp_path, **changes)


def test_a_later_phase_that_trains_all_is_refused_before_the_first_begins(inputs, tmp_path):
    phases = [{"name": "alignment", "loss_functions": [{"function": "attn_mse", "weight": 1}]}, {"name": "all"}]
    with pytest.raises(UserError, match=r"^frozen_precision: float8 is for what is frozen.* \(in phase 'all'\)$"):
        resolve(configuration(inputs, tmp_path, frozen_res=[], phases=phases))
    phases[1]["frozen_precision"] = None
    assert len(resolve(configuration(inputs, tmp_path, frozen_res=[], phases=phases)).phases) == 2


def test_a_later_phase_without_float8_is_refused_before_the_first_begins(inputs, tmp_path, exchanged, monkeypatch):
    def without(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(float8, "_product", without)
    phases = [{"name": "whole", "frozen_precision": None}, {"name": "float8"}]
    with pytest.raises(
        UserError, match=r"^frozen_precision: PyTorch .* has no float8 products .* \(in phase 'float8'\)$"
    ):
        run(configuration(inputs, tmp_path, phases=phases))
    assert not exchanged


def test_nothing_frozen_is_refused_before_training(inputs, tmp_path):
    with pytest.raises(UserError, match=r"^frozen_precision: there is no frozen linear layer"):
        run(configuration(inputs, tmp_path, frozen_res=["norm"]))
