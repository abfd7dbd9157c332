"""A step is a step, however it is cut; what is frozen stays; what is logged is what happened."""

import itertools
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from distillkit.config import LossConfig, UserError
from distillkit.data.signals import TensorRows
from distillkit.losses import ModelShape, Objective
from distillkit.models.attention import trained_attention
from distillkit.runs.checkpoints import complete_checkpoints
from distillkit.teacher import Teacher
from distillkit.teacher.live import LiveTeacher
from distillkit.training.arguments import build_training_arguments
from distillkit.training.batches import Collator
from distillkit.training.context import context_of, divide_rows_of
from distillkit.training.distiller import Distiller
from distillkit.training.freezing import freeze, freeze_all_but
from distillkit.training.parallel import divide, mesh_of, place_teacher
from distillkit.training.precision import cast_for_training, compute_dtype
from distillkit.training.trainer import DistillationTrainer
from distillkit.training.wiring import signal_request
from tests.training.tiny import VOCAB, llama, row

CE_KL = [
    LossConfig(function="cross_entropy", weight=0.2),
    LossConfig(function="kl", weight=0.8, temperature=2.0),
]
ALL_KINDS = [
    *CE_KL,
    LossConfig(function="hs_cosine", weight=0.6),
    LossConfig(function="hinge", weight=0.1, top_k=4, margin=0.1),
]
UNEVEN = [
    row([7, 5], seed=1),
    row([12], seed=2, ignored=9),
    row([3, 3, 3, 3], seed=3),
    row([4], seed=4),
]
SGD = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1}


def make_trainer(
    folder,
    rows=UNEVEN,
    losses=ALL_KINDS,
    frozen=(),
    teacher_layers=2,
    checkpointing=False,
    parallel=None,
    student=None,
    rollouts=None,
    sequence_length=None,
    weights=torch.float32,
    **given,
):
    given = {**SGD, "per_device_train_batch_size": len(rows), **given}
    arguments, _ = build_training_arguments(given, Path(folder), uses_logits=True)
    student = llama(1) if student is None else student().train()
    teacher = llama(0, layers=teacher_layers, hidden_size=32 if teacher_layers == 2 else 48)
    shapes = [ModelShape(model.config.hidden_size, model.config.num_hidden_layers) for model in (student, teacher)]
    freeze(student, frozen)
    attention = trained_attention(student)
    torch.manual_seed(0)
    mapping = "all" if teacher_layers == 2 else [(0, 0), (1, 2), (2, 4)]
    objective = Objective(losses, mapping, *shapes, attention_layers=list(attention))
    if not objective.needs_hidden_states:
        freeze_all_but(student, itertools.chain(*attention.values()))
    cast_for_training(student, compute_dtype(arguments), weights)
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    mesh = mesh_of(parallel, arguments.world_size, arguments.device)
    context = context_of(parallel, arguments)
    if context is not None:
        divide_rows_of(student, "model")
        divide_rows_of(teacher, "teacher.path")
    return DistillationTrainer(
        divide(Distiller(student, objective), arguments.device, mesh),
        LiveTeacher(place_teacher(teacher, arguments.device, mesh)),
        signal_request(objective),
        weights_dtype=compute_dtype(arguments),
        args=arguments,
        train_dataset=TensorRows(Dataset.from_list(rows)),
        data_collator=Collator(0, sequence_length),
        context=context,
        rollouts=rollouts,
    )


def gradients(trainer):
    """Of one step of SGD at learning rate 1."""
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    return {name: before[name] - parameter.detach() for name, parameter in trainer.model.named_parameters()}


def assert_same(actual, expected, tolerance):
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert largest > 1e-3
    for name, gradient in expected.items():
        assert (actual[name] - gradient).abs().max() <= tolerance * largest, name


@pytest.mark.parametrize("teacher_layers", [2, 4])
def test_a_step_does_not_depend_on_how_it_is_cut_into_micro_batches(tmp_path, teacher_layers):
    whole = gradients(make_trainer(tmp_path, teacher_layers=teacher_layers))
    for steps in (2, 4):
        cut = make_trainer(
            tmp_path,
            teacher_layers=teacher_layers,
            per_device_train_batch_size=4 // steps,
            gradient_accumulation_steps=steps,
        )
        assert_same(gradients(cut), whole, 1e-5)


def test_the_step_is_the_sum_over_tokens_divided_by_their_number(tmp_path):
    trainer = make_trainer(tmp_path, losses=[CE_KL[0]], per_device_train_batch_size=1, gradient_accumulation_steps=4)
    student = llama(1)
    total = torch.zeros(())
    count = 0
    for each in UNEVEN:
        documents = torch.tensor(each["input_ids"]).split(each["seq_lengths"])
        labels = torch.tensor(each["labels"]).split(each["seq_lengths"])
        for ids, targets in zip(documents, labels, strict=True):
            logits = student(ids.unsqueeze(0)).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, targets[1:], reduction="sum")
            count += int((targets[1:] != -100).sum())
    (total / count).backward()
    expected = {f"student.{name}": parameter.grad for name, parameter in student.named_parameters()}
    actual = gradients(trainer)
    assert_same({name: actual[name] for name in expected}, expected, 1e-5)
    assert trainer.state.log_history[0]["loss"] == pytest.approx((total / count).item(), rel=1e-5)


class CountingTeacher(Teacher):
    vocabulary_size = VOCAB

    def __init__(self, teacher):
        self.teacher, self.asked = teacher, 0

    def signal(self, batch, request):
        self.asked += 1
        return self.teacher.signal(batch, request)


@pytest.mark.parametrize(("micro_batches", "asked"), [(1, 3), (2, 12)])
def test_pairs_of_a_single_micro_batch_cost_no_second_run_of_the_teacher(tmp_path, micro_batches, asked):
    size = {"per_device_train_batch_size": 4 // micro_batches, "gradient_accumulation_steps": micro_batches}
    trainer = make_trainer(tmp_path, max_steps=3, **size)
    trainer.teacher = CountingTeacher(trainer.teacher)
    trainer.train()
    assert trainer.teacher.asked == asked


def test_gradient_checkpointing_changes_nothing(tmp_path):
    assert_same(gradients(make_trainer(tmp_path, checkpointing=True)), gradients(make_trainer(tmp_path)), 1e-5)


def test_a_row_of_several_documents_trains_as_these_documents_alone(tmp_path):
    packed = [row([5, 7], seed=1), row([9], seed=2)]
    alone = [
        {"input_ids": ids, "labels": labels, "seq_lengths": [len(ids)]}
        for each in packed
        for ids, labels in zip(
            *(
                [part.tolist() for part in torch.tensor(each[name]).split(each["seq_lengths"])]
                for name in ("input_ids", "labels")
            ),
            strict=True,
        )
    ]
    assert_same(gradients(make_trainer(tmp_path, rows=packed)), gradients(make_trainer(tmp_path, rows=alone)), 1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_frozen_parameters_are_bitwise_the_same_after_training(tmp_path, bf16):
    settings = {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1, "max_steps": 3, "bf16": bf16}
    trainer = make_trainer(tmp_path, frozen=["embed_tokens", r"norm\.weight", "mlp"], **settings)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name


def test_what_is_logged_is_each_loss_per_token_and_real_tokens(tmp_path):
    trainer = make_trainer(
        tmp_path, max_steps=2, logging_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    trainer.train()
    first, last, _ = trainer.state.log_history
    weights = {loss.function: loss.weight / sum(each.weight for each in ALL_KINDS) for loss in ALL_KINDS}
    assert first["loss"] == pytest.approx(sum(first[name] * weight for name, weight in weights.items()), rel=1e-5)
    assert first["tokens"] == sum(len(each["input_ids"]) for each in UNEVEN)
    assert last["tokens"] == 2 * first["tokens"]
    assert first["tokens_per_second"] > 0


def test_a_checkpoint_is_a_loadable_student_with_the_projections_beside_it(tmp_path):
    trainer = make_trainer(tmp_path, teacher_layers=4, save_steps=1, max_steps=3, save_total_limit=2, bf16=True)
    trainer.train()
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path)] == [2, 3]
    newest = complete_checkpoints(tmp_path)[-1].path
    loaded = AutoModelForCausalLM.from_pretrained(newest, dtype=torch.float32)
    for name, parameter in trainer.model.student.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert AutoModelForCausalLM.from_pretrained(newest).dtype == torch.bfloat16
    projections = load_file(newest / "projections.safetensors")
    assert len(projections) == 3
    for name, tensor in projections.items():
        assert torch.equal(tensor, trainer.model.objective.get_parameter(name))


def test_vectors_do_not_decay(tmp_path):
    trainer = make_trainer(tmp_path, losses=CE_KL)
    decaying = trainer.get_decay_parameter_names(trainer.model)
    assert all(trainer.model.get_parameter(name).dim() >= 2 for name in decaying)
    assert "student.model.layers.0.mlp.up_proj.weight" in decaying


def test_an_optimizer_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(UserError, match=r"training_args\.optim: galore_adamw: .*galore"):
        make_trainer(tmp_path, losses=CE_KL, optim="galore_adamw", optim_target_modules=["mlp"]).train()


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_no_number_never_reaches_the_weights(tmp_path, max_grad_norm):
    trainer = make_trainer(tmp_path, losses=CE_KL, max_grad_norm=max_grad_norm, max_steps=3)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.model.student.model.norm.weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(UserError, match=r"training_args\.learning_rate: the gradient of step 1 is nan; the run has"):
        trainer.train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())


def test_a_gradient_that_the_teacher_spoils_is_called_the_teachers(tmp_path):
    trainer = make_trainer(tmp_path, losses=CE_KL, max_steps=3)
    trainer.teacher.model.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(
        UserError, match=r"teacher\.path: .* gives NaN or infinity, first behind layers\.1\.mlp\.down_proj"
    ):
        trainer.train()


@pytest.mark.parametrize("damage", ["cut", "gone", "one missing"])
def test_projections_that_a_checkpoint_lacks_are_not_begun_anew(tmp_path, damage):
    trainer = make_trainer(tmp_path, teacher_layers=4)
    path = tmp_path / "projections.safetensors"
    projections = trainer.model.objective.state_dict()
    save_file(projections, path)
    trainer._load_from_checkpoint(str(tmp_path))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "gone":
        path.unlink()
    else:
        save_file(dict(list(projections.items())[1:]), path)
    with pytest.raises(UserError, match=r"output_path: .*projections\.safetensors does not hold the projections of"):
        trainer._load_from_checkpoint(str(tmp_path))


def test_batches_sent_ahead_belong_to_their_pass_over_the_data(tmp_path):
    """A pass that begins again with smaller batches, as after a full memory, trains none of the larger ones."""
    trainer = make_trainer(tmp_path)
    trainer.teacher.steps_ahead = 2
    assert trainer._next_batches(iter(range(9)), 1) == [0]
    assert trainer._next_batches(again := iter(range(50, 59)), 2) == [50, 51]
    assert trainer._next_batches(again, 2) == [52, 53]
