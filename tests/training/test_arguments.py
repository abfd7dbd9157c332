"""training_args reach Trainer as given, what is for the student alone does not, mistakes name their key."""

import pytest
import torch

from distillkit.config.errors import UserError
from distillkit.training.arguments import build_training_arguments
from distillkit.training.compilation import Compilation


def build(tmp_path, uses_logits=True, **given):
    return build_training_arguments({"use_cpu": True, **given}, tmp_path, uses_logits=uses_logits)


def test_arguments_pass_through_over_the_defaults(tmp_path):
    arguments, _ = build(tmp_path, learning_rate=1e-3, warmup_steps=0.025, optim="adafactor", save_total_limit=5)
    assert arguments.learning_rate == 1e-3
    assert arguments.get_warmup_steps(1000) == 25
    assert arguments.optim == "adafactor"
    assert (arguments.save_total_limit, arguments.report_to) == (5, [])
    assert arguments.output_dir == str(tmp_path)


def test_bf16_trains_on_the_cpu_too(tmp_path):
    assert build_training_arguments({"bf16": True}, tmp_path, uses_logits=True)[0].bf16


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_is_for_the_student_alone_and_not_reentrant(tmp_path, name):
    arguments, techniques = build(tmp_path, **{name: True})
    assert not arguments.gradient_checkpointing
    assert techniques.gradient_checkpointing
    assert techniques.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_compilation_is_for_the_students_layers_alone(tmp_path):
    arguments, techniques = build(tmp_path, torch_compile_mode="max-autotune")
    assert not arguments.torch_compile
    assert techniques.compilation == Compilation("inductor", "max-autotune")
    assert build(tmp_path)[1].compilation is None


def test_parameters_without_gradient_are_expected_only_without_losses_on_logits(tmp_path):
    assert build(tmp_path)[0].ddp_find_unused_parameters is False
    assert build(tmp_path, uses_logits=False)[0].ddp_find_unused_parameters is True


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": 1e-4, "optim": "adamw_torhc"}, r"training_args\.optim: adamw_torhc is not a valid"),
        ({"bf16": True, "fp16": True}, r"training_args\.bf16: At most one of fp16 and bf16"),
        ({"report_to": "nowhere"}, r"training_args\.report_to: 'nowhere' is not installed"),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            r"training_args\.accelerator_config: dispatch_batches: each",
        ),
    ],
)
def test_what_trainer_refuses_names_its_key(tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        build(tmp_path, **given)


@pytest.mark.parametrize(
    ("package", "optim", "message"),
    [
        ("torchao", "adamw_torch_8bit", r"adamw_torch_8bit needs torchao: pip install 'distillkit\[torchao\]'"),
        ("bitsandbytes", "adamw_bnb_8bit", "adamw_bnb_8bit needs bitsandbytes; install it, or use adamw_torch_8bit"),
    ],
)
def test_an_optimizer_whose_package_is_missing_is_refused_before_models_are_loaded(
    tmp_path, monkeypatch, package, optim, message
):
    monkeypatch.setattr(f"distillkit.training.arguments.is_{package}_available", lambda: False)
    with pytest.raises(UserError, match=rf"training_args\.optim: {message}"):
        build(tmp_path, optim=optim)


def test_adamw_is_fused_unless_another_optimizer_is_named(tmp_path):
    assert build(tmp_path)[0].optim == "adamw_torch_fused"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a device")
def test_without_a_device_the_run_is_on_the_cpu(tmp_path):
    assert build_training_arguments({}, tmp_path, uses_logits=True)[0].device.type == "cpu"
