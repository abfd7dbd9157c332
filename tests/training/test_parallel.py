"""Models divided over processes take the step that one process takes with whole models, and make the same run."""

import io
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM, TrainingArguments

from distillkit.cli import main
from distillkit.config import RunConfig, UserError, load_run
from distillkit.config.parallel import ParallelConfig
from distillkit.config.training_args import QUANTIZED_OPTIMIZERS, STOCHASTIC_OPTIMIZERS
from distillkit.console import USAGE_ERROR
from distillkit.losses import ModelShape, Objective
from distillkit.models.streaming import open_stored
from distillkit.runs.checkpoints import complete_checkpoints
from distillkit.training import distill, optimizers, setup, trainer
from distillkit.training.arguments import build_training_arguments
from distillkit.training.distiller import Distiller
from distillkit.training.divided_checkpoints import SHARDS, CheckpointWriter, _Writer, check_shards
from distillkit.training.parallel import divide, mesh_of, place_teacher, whole_state
from distillkit.training.trainer import OPTIMIZER, DistillationTrainer
from tests.forks import environments, exit_codes, started
from tests.memory import peak_of
from tests.shared import made_once
from tests.student.students import student
from tests.test_recipes import RECIPES, small
from tests.training.test_alignment import SHAPE, STUDENTS
from tests.training.test_distill import configuration, run
from tests.training.test_phases import configuration as phases_of
from tests.training.test_phases_killed import PHASES, there
from tests.training.test_processes import ALL_KINDS, NOTHING_COUNTS_FOR_ONE, UNEVEN, loss
from tests.training.test_trainer import assert_same, make_trainer
from tests.training.tiny import llama, row, save_llama, save_text

ATTENTION = [loss("attn_mse"), loss("attn_cosine")]


LONG_ROWS = [row(lengths, seed) for seed, lengths in enumerate([[5, 70, 3, 50], [128], [1, 1, 60], [90, 2, 30]])]
"""Documents cross the boundaries between two and four processes, and some rows are padded."""


WIDE = SHAPE | {"hidden_size": 48}
THREE_HEADS = {"num_attention_heads": 3, "num_key_value_heads": 3}
BFLOAT16 = {
    "weights": torch.bfloat16, "bf16": True, "optim": "adamw_torch", "learning_rate": 2.0, "max_steps": 1,
    "adam_epsilon": 0.1,
}  # fmt: skip
"""Two thirds of a step of SGD, at a rate that lifts it above the rounding of bfloat16 weights."""


@dataclass(frozen=True)
class Case:
    losses: list = field(default_factory=lambda: ALL_KINDS)
    options: dict = field(default_factory=dict)
    rows: list = field(default_factory=lambda: [*UNEVEN, *NOTHING_COUNTS_FOR_ONE])
    tolerance: float = 1e-5


def long_case(student, losses=ALL_KINDS, **options):
    return Case(losses, {"student": student, "teacher_layers": 4, **options}, LONG_ROWS)


CASES = {
    "all kinds": Case(),
    "projections": Case(options={"teacher_layers": 4}),
    "checkpointed": Case(options={"checkpointing": True}),
    "frozen": Case(options={"frozen": ["mlp", "embed_tokens"]}),
    "clipped": Case(options={"max_grad_norm": 0.01}),
    "hidden states alone": Case([loss("hs_mse")]),
    "attention": Case(ATTENTION),
    "attention beside others": Case([*ATTENTION, *ALL_KINDS]),
    "bfloat16 beside masters": Case(options={"frozen": ["mlp", "embed_tokens"], "bf16": True}, tolerance=0.05),
    "bfloat16 weights": Case(options=BFLOAT16, tolerance=0.02),
    "bfloat16 weights beside projections": Case(options={**BFLOAT16, "teacher_layers": 4}, tolerance=0.02),
    "bfloat16 attention": Case(ATTENTION, options=BFLOAT16, tolerance=0.02),
    "long rows, hybrid": long_case(STUDENTS["hybrid"]),
    "long rows, grouped": long_case(STUDENTS["hybrid, grouped"]),
    "long rows, odd heads": long_case(lambda: student(config_changes=WIDE | THREE_HEADS)),
    "long rows, attention": long_case(
        lambda: student(layout="kda_only", config_changes=WIDE), [*ATTENTION, *ALL_KINDS], checkpointing=True
    ),
    "adamw": Case(options={"optim": "adamw_torch", "learning_rate": 0.01, "max_steps": 3, "adam_epsilon": 0.1}),
}

FEW = ["projections", "attention beside others", "bfloat16 weights beside projections"]
MESHES = [
    (2, ParallelConfig(), [name for name in CASES if "long rows" not in name]),
    (4, ParallelConfig(), FEW),
    (4, ParallelConfig(replicate=2), FEW),
    (2, ParallelConfig(context=2), LONG := [name for name in CASES if "long rows" in name]),
    (4, ParallelConfig(context=4), LONG),
    (4, ParallelConfig(shard=1, replicate=4, context=2), LONG[:1]),
]
"""Processes, how models and rows are divided over them, and cases."""


def forks(number, function, argument, code=0):
    """Call the function in so many processes that know of each other, forked from one that has imported all."""
    given = [(each, function, argument) for each in environments(number)]
    assert exit_codes(started(run_as, given), 150) == [code] * number


def run_as(environment, function, argument):
    os.environ |= environment
    function(argument)


def change(folder, case, **options):
    """What steps have changed, at a rate that lifts it above the rounding of the weights."""
    given = {"learning_rate": 64.0, **case.options, **options}
    trainer = make_trainer(folder, rows=case.rows, losses=case.losses, **given)
    names = [name for name, _ in trainer.model.named_parameters()]
    before = {name: tensor.clone() for name, tensor in whole_state(trainer.model).items()}
    trainer.train()
    after = whole_state(trainer.model)
    return {name: before[name].float() - after[name].float() for name in names if name in after}


OPTIMIZERS = {
    "adamw_torch": (torch.bfloat16, 0),
    "adamw_torch_fused": (torch.float32, 1e-6),
    "sgd": (torch.float32, 1e-6),
    "rmsprop": (torch.float32, 1e-6),
    "adagrad": (torch.float32, 1e-6),
    "adamw_torch_8bit": (torch.float32, 0.02),
    "adamw_torch_4bit": (torch.float32, 0.2),
}
"""The dtype of the weights, and the error of what few steps of equal gradients change, relative to it."""

SHAPES = [(7, 33), (50,), (2, 5), (16, 256), (65, 256), (70, 128)]
"""Of weights, not all of which can be divided evenly, or between blocks of 256 or 128 numbers."""


def stepped(optim, mesh, steps, start=None, folder=None, dtype=None):
    """Weights after steps whose gradients follow from their numbers; divided over the mesh.

    start: the folder of a checkpoint, of another mesh perhaps. folder: where one is written.
    """
    dtype = dtype or OPTIMIZERS[optim][0]
    whole = [random_numbers(index, shape).to(dtype) for index, shape in enumerate(SHAPES)]
    weights = nn.ParameterDict({str(index): nn.Parameter(place(each, mesh)) for index, each in enumerate(whole)})
    arguments = TrainingArguments(optim=optim, learning_rate=0.01, use_cpu=True)
    chosen, options = DistillationTrainer.get_optimizer_cls_and_kwargs(arguments, weights)
    optimizer = chosen(list(weights.values()), **options)
    if start is not None:
        state = {"weights": weights.state_dict(), "optimizer": get_optimizer_state_dict(weights, optimizer)}
        checkpoint.load(state, checkpoint_id=start)
        set_optimizer_state_dict(weights, optimizer, state["optimizer"])
    for step in steps:
        for index, (weight, each) in enumerate(zip(weights.values(), whole, strict=True)):
            weight.grad = place(random_numbers(100 * step + index, each.shape).to(each.dtype), mesh)
        optimizer.step()
    if folder is not None:
        state = {"weights": weights.state_dict(), "optimizer": get_optimizer_state_dict(weights, optimizer)}
        checkpoint.save(state, checkpoint_id=folder)
    return {name: whole_tensor(weight.detach()) for name, weight in weights.items()}


def random_numbers(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def place(tensor, mesh):
    if mesh is None:
        return tensor
    placements = [Shard(0) if name == "shard" else Replicate() for name in mesh.mesh_dim_names]
    return distribute_tensor(tensor, mesh, placements)


def whole_tensor(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


LAYOUTS = {"two": {"shard": 2}, "four": {"shard": 4}, "two by two": {"replicate": 2, "shard": 2}}


def optimizer_steps(folder):
    """By one of several processes: four steps of each optimizer, and the last two of them from a checkpoint of the
    first two. Four processes make those of `StochasticAdamW` alone, and resume from what two have written.
    """
    optimizers.SLICE = 1000
    processes = int(os.environ["WORLD_SIZE"])
    for layout, sizes in LAYOUTS.items():
        if math.prod(sizes.values()) != processes:
            continue
        mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        for optim in OPTIMIZERS if layout == "two" else ["adamw_torch"]:
            found = {"whole": stepped(optim, mesh, range(4))}
            if optim in STOCHASTIC_OPTIMIZERS:
                if layout == "two":
                    stepped(optim, mesh, range(2), folder=folder / f"{optim} of two")
                found["resumed"] = stepped(optim, mesh, range(2, 4), start=folder / f"{optim} of two")
            if optim in QUANTIZED_OPTIMIZERS:
                found["bfloat16"] = stepped(optim, mesh, range(4), dtype=torch.bfloat16)
            if os.environ["RANK"] == "0":
                for name, weights in found.items():
                    save_file(weights, folder / f"{optim} {layout} {name}")


def changes(folder):
    """Of all cases, by one of several processes."""
    for index, (number, parallel, names) in enumerate(MESHES):
        if number == int(os.environ["WORLD_SIZE"]):
            for name in names:
                rows = len(CASES[name].rows) * parallel.context // number  # of each process, in two micro-batches
                cut = {"per_device_train_batch_size": rows // 2, "gradient_accumulation_steps": 2}
                found = change(folder / name, CASES[name], parallel=parallel, **cut)
                if os.environ["RANK"] == "0":
                    save_file({key: each.clone() for key, each in found.items()}, folder / f"{name} {index}")
    optimizer_steps(folder)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    def make(folder):
        for number in (2, 4):
            forks(number, changes, folder)

    return made_once(tmp_path_factory, "steps of divided models", make)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", CASES)
def test_divided_models_take_the_step_of_whole_ones(name, divided, tmp_path):
    expected = change(tmp_path, CASES[name])
    for index, (_, _, names) in enumerate(MESHES):
        if name in names:
            found = load_file(divided / f"{name} {index}")
            assert_same(found, expected, CASES[name].tolerance)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_optimizers_make_the_same_of_equal_gradients_however_weights_are_divided(optim, divided, monkeypatch):
    """Weights in bfloat16, which are rounded by random numbers, to the last bit; so is what is resumed."""
    monkeypatch.setattr(optimizers, "SLICE", 1000)
    start, expected = (stepped(optim, None, range(number)) for number in (0, 4))
    for layout in LAYOUTS if optim == "adamw_torch" else ["two"]:
        found = load_file(divided / f"{optim} {layout} whole")
        for key, tensor in expected.items():
            change = (tensor - start[key]).float().norm()
            assert (found[key] - tensor).float().norm() <= OPTIMIZERS[optim][1] * change, key
        if optim in STOCHASTIC_OPTIMIZERS:
            resumed = load_file(divided / f"{optim} {layout} resumed")
            assert [key for key in found if not torch.equal(found[key], resumed[key])] == []


@pytest.mark.parametrize("optim", QUANTIZED_OPTIMIZERS)
def test_bfloat16_weights_of_optimizers_that_draw_for_each_part_are_right_on_average(optim, divided):
    """Of 16,640 weights, each within one bf16 step of 2 ** -6, the mean is within four standard deviations."""
    expected = stepped(optim, None, range(4), dtype=torch.float32)["4"]
    found = load_file(divided / f"{optim} two bfloat16")["4"]
    assert (found.double() - expected).mean().abs() <= 4 * 2**-6 / math.sqrt(expected.numel())


def read_parts(folder):
    """By one of four processes: what it needs for two models, their weights as they are then, and damaged ones."""
    arguments, _ = build_training_arguments({"use_cpu": True}, folder, uses_logits=True)
    mesh = mesh_of(ParallelConfig(), arguments.world_size, arguments.device)

    def models(name):
        teacher, stored = (open_stored(folder / name, key=name, trust_remote_code=False) for _ in range(2))
        shape = ModelShape(teacher.model.config.hidden_size, teacher.model.config.num_hidden_layers)
        objective = Objective(ALL_KINDS, "all", shape, shape)
        placed = place_teacher(teacher.model, arguments.device, mesh, teacher)
        return placed, divide(Distiller(stored.model, objective), arguments.device, mesh, stored)

    models("small")
    peak, (teacher, distiller) = peak_of(lambda: models("large"))
    states = [whole_state(model) for model in (teacher, distiller.student)]
    with pytest.raises(UserError, match=r"^damaged: .*1 of its tensors hold NaN or infinity \(model\.norm\.weight\)"):
        models("damaged")
    (folder / f"peak {os.environ['RANK']}").write_text(str(peak))
    if os.environ["RANK"] == "0":
        expected = load_file(folder / "large/model.safetensors")
        for state in states:
            assert state.keys() == expected.keys()
            assert [name for name in expected if not torch.equal(state[name], expected[name])] == []
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(240)
def test_each_process_reads_its_parts_alone(tmp_path):
    """Of two models a quarter each, with what comes and goes: less than one whole. Only one process sees the damage."""
    save_llama(tmp_path / "small", 0)
    save_llama(tmp_path / "damaged", 0)
    weights = load_file(tmp_path / "damaged/model.safetensors")
    weights["model.norm.weight"][-1] = torch.nan
    save_file(weights, tmp_path / "damaged/model.safetensors", {"format": "pt"})
    llama(0, layers=4, hidden_size=512).save_pretrained(tmp_path / "large")
    forks(4, read_parts, tmp_path)
    whole = (tmp_path / "large/model.safetensors").stat().st_size
    peaks = [int((tmp_path / f"peak {rank}").read_text()) for rank in range(4)]
    assert max(peaks) < 0.8 * whole


def test_a_model_that_each_process_loads_whole_is_named_with_the_reason(tmp_path):
    folder, said = save_llama(tmp_path / "model", 0), io.StringIO()
    options = {"key": "model", "trust_remote_code": False, "device_map": "cpu"}
    model, stored = setup._open(folder, Console(file=said, width=200), object(), **options)
    assert stored is None and not model.lm_head.weight.is_meta
    assert said.getvalue() == (
        "model: each process loads the whole model before it is divided, because device_map asked for it\n"
    )


def test_blocks_of_numbers_are_not_divided_otherwise(tmp_path):
    checkpoint.save({SHARDS: 2}, checkpoint_id=tmp_path / OPTIMIZER)
    check_shards(tmp_path / OPTIMIZER, 2, "adamw_torch_8bit")
    with pytest.raises(UserError, match=r"^parallel\.shard: .* was written with shard 2, .* resume with shard 2$"):
        check_shards(tmp_path / OPTIMIZER, 4, "adamw_torch_8bit")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "teacher": save_llama(folder / "teacher", 0, layers=4, hidden_size=48, tied=False),
        "student": save_llama(folder / "student", 1),
        "text": save_text(folder / "train.jsonl"),
        "held_out": save_text(folder / "valid.jsonl", documents=10),
    }


def described(inputs, folder, processes, context=1, **changes):
    """Six steps of four rows each, a checkpoint after four, and after each three a measurement."""
    training = {
        "max_steps": 6, "save_steps": 4, "per_device_train_batch_size": 1, "eval_strategy": "steps", "eval_steps": 3,
        "gradient_accumulation_steps": 4 * context // processes, "optim": "adamw_torch", "adam_epsilon": 1e-3,
    }  # fmt: skip
    pairs = {"layer_mapping": [[0, 0], [1, 2], [2, 4]], "resize_embeddings_to_multiple_of": 64, "frozen_res": ["mlp"]}
    parallel = {} if processes == 1 else {"parallel": {"shard": processes, "context": context}}
    return configuration(inputs, folder, training, **pairs, **parallel, **changes)


def run_path(path):
    distill(str(path), Console(file=io.StringIO()))


def written(config):
    path = Path(f"{config.output_path}.yaml")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def run_on(processes, config):
    if processes == 1:
        run(config)
    else:
        forks(processes, run_path, written(config))
    return Path(config.output_path)


def kill_on(processes, config, moment, chance, function=run_path):
    """Begin a run, or go on with it, and kill all processes by SIGKILL a little after a moment of its life."""
    path, folder = written(config), Path(config.output_path)
    running = started(run_as, [(each, function, path) for each in environments(processes)])
    while all(each.is_alive() for each in running) and not moment(folder):
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.2))
    for each in running:
        each.kill()
    for each in running:
        each.join()
    assert [each.exitcode for each in running] == [-signal.SIGKILL] * processes


@pytest.fixture(scope="module")
def of_one(inputs, tmp_path_factory):
    return run_on(1, described(inputs, tmp_path_factory.mktemp("one") / "run", 1))


@pytest.fixture(scope="module")
def of_two(inputs, tmp_path_factory):
    return run_on(2, described(inputs, tmp_path_factory.mktemp("two") / "run", 2))


def assert_same_weights(folder, expected, tolerance=1e-5):
    ours, theirs = (load_file(each / "model.safetensors") for each in (folder, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert (ours[name] - tensor).abs().max() <= tolerance, name


def assert_same_run(folder, expected):
    assert_same_weights(folder, expected)
    ours, theirs = (json.loads((each / "results.json").read_text()) for each in (folder, expected))
    assert ours["samples"] == theirs["samples"]
    for name in ("before", "after"):
        assert ours["divergence"][name] == pytest.approx(theirs["divergence"][name], rel=1e-4)
    ours, theirs = (
        [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()] for each in (folder, expected)
    )
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for key in ("loss", "kl", "grad_norm", "eval_kl"):
        found = [[line[key] for line in lines if key in line] for lines in (ours, theirs)]
        assert found[0] == pytest.approx(found[1], rel=1e-3), key
    assert AutoModelForCausalLM.from_pretrained(folder).config.architectures == ["LlamaForCausalLM"]


@pytest.mark.timeout(240)
def test_a_run_of_divided_models_is_that_of_one_process(of_one, of_two):
    assert_same_run(of_two, of_one)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("processes", "context"), [(1, 1), (4, 2)])
def test_resumed_on_another_number_of_processes(processes, context, inputs, of_one, of_two, tmp_path):
    folder = shutil.copytree(of_two, tmp_path / "run")
    for path in [*folder.glob("*.safetensors"), folder / "results.json"]:
        path.unlink()
    shutil.rmtree(folder / "checkpoint-6", ignore_errors=True)
    run_on(processes, described(inputs, folder, processes, context, resume=True))
    record = json.loads((folder / "run.json").read_text())
    assert record["resumed"] and record["processes"] == processes
    assert_same_run(folder, of_one)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_phases_of_a_student_that_is_converted(dtype, inputs, tmp_path):
    """Attention alignment, then distillation, as recipes/miniature/radlads.yaml begins; rows are divided, too.

    Weights in bfloat16 are the same to the last bit, for gradients of two processes are exact sums in both runs.
    """
    phases = [
        {name: value for name, value in phase.items() if name not in ("tokens", "training_args")}
        for phase in PHASES[:2]
    ]
    bf16 = {"bf16": True, "max_grad_norm": 0} if dtype == "bfloat16" else {}
    folders = []
    for number in (1, 2):
        parallel = {"context": 2} if dtype == "float32" else {"shard": 2}
        steps = 2 if number == 1 or dtype == "float32" else 1
        training = {"max_steps": 3, "gradient_accumulation_steps": steps, "adam_epsilon": 1e-3, **bf16}
        divided = {"parallel": parallel} if number > 1 else {}
        config = phases_of(inputs, tmp_path / str(number), training, phases, trained_weights=dtype, **divided)
        folders.append(run_on(number, config))
    for part in (".", "phases/1-alignment"):
        assert_same_weights(*(folder / part for folder in folders), 0 if bf16 else 1e-5)


def miniature(inputs, folder, processes):
    """A recipe of three phases on tiny models: in each two steps of four rows, and a checkpoint after each."""
    recipe = "miniature/radlads.yaml"
    training = {"max_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4 // processes}
    overrides = small(recipe, *(Path(inputs[each]) for each in ("teacher", "text", "held_out")), folder)
    for index in range(3):
        overrides += [f"phases.{index}.training_args.{key}={value}" for key, value in training.items()]
    overrides += ["training_args.adam_epsilon=1e-3", "training_args.save_steps=1", "evaluation=null", "resume=true"]
    return load_run(RECIPES / recipe, [*overrides, *(["parallel={}"] if processes > 1 else [])]).config


@pytest.mark.timeout(240)
def test_a_miniature_recipe_of_divided_models_killed_and_resumed_on_one_process_ends_as_on_one(inputs, tmp_path):
    expected, folder, chance = tmp_path / "undisturbed", tmp_path / "killed", random.Random(7)
    run_on(1, miniature(inputs, expected, 1))
    kill_on(2, miniature(inputs, folder, 2), there("phases/2-distillation/checkpoint-1/complete"), chance)
    run_on(1, miniature(inputs, folder, 1))
    for part in (".", "phases/1-alignment", "phases/2-distillation"):
        assert_same_weights(folder / part, expected / part)


def in_background(inputs, folder, **training):
    given = described(inputs, folder, 2).model_dump(mode="json")
    given["parallel"]["async_checkpoints"] = True
    given["training_args"] |= training
    return RunConfig.parse(given)


def output_of(path):
    return Path(yaml.safe_load(path.read_text())["output_path"])


def last_step(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


@pytest.mark.timeout(240)
def test_checkpoints_written_in_the_background_leave_a_run_as_it_is(inputs, of_two, tmp_path):
    folder = run_on(2, in_background(inputs, tmp_path / "run", save_steps=1, save_total_limit=1))
    assert_same_run(folder, of_two)
    assert_same_weights(folder, of_two, 0)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-6"]


def run_on_a_slow_disk(path):
    """The parts of checkpoint 2 are written when step 3 is made, the student of checkpoint 4 never."""
    folder, write_data, save_student = output_of(path), _Writer.write_data, trainer.save_student

    def late(writer, *given):
        end = time.monotonic() + 60
        while last_step(folder) < 3:
            assert time.monotonic() < end, "training waits for its checkpoint"
            time.sleep(0.01)
        return write_data(writer, *given)

    def never(student, target, *given):
        time.sleep(120 if target.name == "checkpoint-4" else 0)
        save_student(student, target, *given)

    with patch.object(_Writer, "write_data", late), patch.object(trainer, "save_student", never):
        run_path(path)


@pytest.mark.timeout(240)
def test_killed_while_a_checkpoint_is_written_in_the_background(inputs, of_one, tmp_path):
    """The one before it counts, which is that of its step although training went on; one process resumes from it."""
    folder, training = tmp_path / "run", {"save_steps": 2, "save_total_limit": 1, "logging_steps": 1}
    config = in_background(inputs, folder, **training)
    kill_on(2, config, lambda folder: last_step(folder) > 4, random.Random(0), run_on_a_slow_disk)
    (kept,) = complete_checkpoints(folder)
    assert kept.step == 2 and [json.loads(line)["step"] for line in kept.metrics().splitlines()] == [1, 2]
    assert (folder / "checkpoint-4" / OPTIMIZER).exists()
    run_on(1, described(inputs, folder, 1, resume=True))
    assert_same_weights(folder, of_one)


def run_on_a_full_disk(path):
    """The second process has no room for its part of checkpoint 4."""
    write, main_process = CheckpointWriter.write, os.environ["RANK"] == "0"

    def without_room(writer, folder, *given):
        if folder.parent.name == "checkpoint-4" and not main_process:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        write(writer, folder, *given)

    said = path.with_name(f"said by {'the main' if main_process else 'another'} process")
    with patch.object(CheckpointWriter, "write", without_room), said.open("w") as file, redirect_stderr(file):
        sys.exit(main([str(path)]))


@pytest.mark.timeout(240)
def test_a_full_disk_under_one_process_ends_the_run_with_a_line_and_the_checkpoint_before(inputs, tmp_path):
    config = in_background(inputs, tmp_path / "run", save_steps=2, save_total_limit=1)
    forks(2, run_on_a_full_disk, written(config), code=USAGE_ERROR)
    for said in tmp_path.glob("said by *"):
        lines = [line for line in said.read_text().splitlines() if line.startswith("error")]
        assert lines == [
            f"error: output_path: the disk is full at '{config.output_path}'; free some space, and go on with --resume"
        ]
    (kept,) = complete_checkpoints(tmp_path / "run")
    assert kept.step == 2 and kept.damage() == []
