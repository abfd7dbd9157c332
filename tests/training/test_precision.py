"""Small updates are not lost: what trains is float32, what rests has the dtype that computes."""

import torch
from transformers import TrainingArguments

from distillkit.training.freezing import freeze
from distillkit.training.precision import cast_for_saving, cast_for_training, compute_dtype
from tests.training.tiny import batch, llama, row


def test_masters_are_float32_and_frozen_weights_bf16():
    model = llama(0)
    freeze(model, ["mlp"])
    line = cast_for_training(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if ".mlp." in name else torch.float32)
    assert "float32 master weights under bfloat16 autocast" in line


def test_without_masters_all_is_bf16_but_what_the_architecture_keeps():
    model = llama(0)
    model._keep_in_fp32_modules_strict = {"norm"}
    freeze(model, ["mlp"])
    line = cast_for_training(model, torch.bfloat16, torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name == "model.norm.weight" else torch.bfloat16)
    assert "parameters train in bfloat16, rounded stochastically" in line


def test_a_tied_head_stays_tied():
    model = llama(0, tied=True)
    freeze(model, ["mlp"])
    cast_for_training(model, torch.bfloat16)
    cast_for_saving(model, torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_an_update_too_small_for_bf16_reaches_the_master_weights():
    model = llama(0)
    freeze(model, ["mlp"])
    cast_for_training(model, torch.bfloat16)
    weight = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight.fill_(0.02)
    optimizer = torch.optim.AdamW([weight], lr=1e-5, weight_decay=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=batch(row([8]))["input_ids"]).logits.sum().backward()
    optimizer.step()
    moved = weight[weight.grad != 0]
    assert (moved != 0.02).all()
    assert torch.equal(moved.bfloat16(), torch.full_like(moved, 0.02).bfloat16())


def test_modules_that_an_architecture_keeps_in_float32_stay_there():
    model = llama(0)
    model._keep_in_fp32_modules_strict = {"norm"}
    freeze(model, ["norm"])
    cast_for_training(model, torch.bfloat16)
    cast_for_saving(model, torch.bfloat16)
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_the_dtype_that_computes_is_the_one_of_the_training_arguments(tmp_path):
    settings = {"output_dir": str(tmp_path), "use_cpu": True}
    assert compute_dtype(TrainingArguments(**settings)) == torch.float32
    assert compute_dtype(TrainingArguments(**settings, bf16=True)) == torch.bfloat16
