"""What each GPU holds and sends where `parallel` divides the models: as processes do it, and as counted by hand."""

import json
import os

import pytest
import torch
from torch.distributed.tensor import DTensor

from distillkit.config import UserError
from distillkit.config.parallel import ParallelConfig
from distillkit.models.divided_rows import divided_rows
from distillkit.planning import plan_run
from distillkit.planning.gpus import LINK_SHARE, NETWORK, find_gpu
from distillkit.planning.ledger import Collective
from distillkit.planning.processes import Processes
from distillkit.planning.result import StepTime
from distillkit.teacher.live import LiveTeacher
from distillkit.training.distiller import Distiller
from distillkit.training.parallel import divide, mesh_of, place_teacher
from distillkit.training.wiring import objective_of, signal_request
from tests.planning.small import ATTENTION, DISTRIBUTION, FROZEN, HIDDEN, run, teacher_folder, text_file
from tests.planning.test_plan import printed
from tests.planning.test_step import models, simulated
from tests.training.test_parallel import forks
from tests.training.test_trainer import make_trainer

TWICE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
CASES = {
    "all trained": run(losses=DISTRIBUTION, arguments=TWICE, sequence_length=32),
    "frozen in bfloat16, with projections": run(
        losses=HIDDEN, arguments=TWICE, sequence_length=32, frozen_res=FROZEN, force_hidden_state_projection=True
    ),
    "attention": run(losses=ATTENTION, arguments=TWICE, sequence_length=32),
}
KINDS = ("teacher weights", "student weights", "gradients", "optimizer states")
CPU = torch.device("cpu")
THREE = Processes(3, parallel=ParallelConfig())
"""No size of these models is a multiple of three: the first process has the largest part."""


def bytes_of(tensors):
    """Of all storages, those that several share once."""
    local = [each.to_local() if isinstance(each, DTensor) else each for each in tensors]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in local}.values())


def held(config):
    """Bytes that this process holds after a real step, by kind."""
    teacher, student = models(config, "llama")
    mesh = mesh_of(THREE.parallel, THREE.count, CPU)
    teacher = LiveTeacher(place_teacher(teacher, CPU, mesh))
    objective = objective_of(config, student, teacher, 512, 64)
    distiller = divide(Distiller(student, objective).train(), CPU, mesh)
    ids = torch.zeros(1, config.sequence_length, dtype=torch.long)
    batch = {"input_ids": ids, "position_ids": torch.arange(config.sequence_length)[None], "targets": ids}
    for _ in range(2):
        signal = teacher.signal(batch, signal_request(objective, vocabulary_size=512))
        with torch.autocast("cpu", torch.bfloat16):
            output = distiller(**batch, normalizer=torch.ones(()), signal=signal)
        output["loss"].backward()
    trained = [each for each in distiller.parameters() if each.grad is not None]
    gradients = [each.grad for each in trained]
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    states = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    whole = [[*model.parameters(), *model.buffers()] for model in (teacher.model, distiller)]
    return dict(zip(KINDS, map(bytes_of, (*whole, gradients, states)), strict=True))


def caches(folder):
    """Whether autocast keeps copies of weights in the passes of a real run."""
    trainer = make_trainer(folder, parallel=THREE.parallel, bf16=True, per_device_train_batch_size=1)
    found = []
    decoder = trainer.model.student.get_decoder()
    decoder.register_forward_pre_hook(lambda *_: found.append(torch.is_autocast_cache_enabled()))
    trainer.train()
    return found


def count(folder):
    torch.distributed.init_process_group("gloo")
    found = {name: held(config) for name, config in CASES.items()} | {"caches": caches(folder)}
    (folder / os.environ["RANK"]).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("counted")
    forks(THREE.count, count, folder)
    return json.loads((folder / "0").read_text())


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", CASES)
def test_a_process_holds_what_the_plan_says(name, counted):
    planned = simulated(CASES[name], "llama", processes=THREE).memory
    assert {kind: planned[kind] for kind in KINDS} == counted[name]


def test_autocast_keeps_no_copies_of_divided_weights(counted):
    assert counted["caches"] == [False]


EMBEDDINGS, NORM = 512 * 64, 64
TEACHER_LAYER = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 256 + 2 * 64


def test_what_is_gathered_and_sent_as_counted_by_hand():
    """Four GPUs: two copies, each on two. A teacher in bfloat16, a student in float32 that trains."""
    config = run(losses=DISTRIBUTION, arguments={"bf16": True})
    cost = simulated(config, "llama", processes=Processes(4, parallel=ParallelConfig(replicate=2)))
    _, student = models(config, "llama")
    layers = [sum(each.numel() for each in layer.parameters()) for layer in student.model.layers]
    root = 2 * EMBEDDINGS + NORM
    assert sum(each.numel() for each in student.parameters()) == root + sum(layers)
    gathered = 2 * (EMBEDDINGS + NORM + 2 * TEACHER_LAYER)  # the teacher's head is whole on each
    gathered += 4 * (root + 2 * sum(layers))  # a layer for each of the two passes, the rest until both are done
    kinds = {"all-gather": gathered / 2, "reduce-scatter": 4 * (root + sum(layers)) / 2}
    kinds["all-reduce"] = kinds["reduce-scatter"]  # of a half, twice a half of it
    assert cost.traffic.kinds == kinds
    assert cost.memory["gathered weights"] == 4 * (root + layers[-1])  # the last layer's until the next is gathered
    alone = (EMBEDDINGS + NORM + TEACHER_LAYER) + 2 * (root + layers[0]) + 2 * layers[-1]
    assert cost.traffic.inside_alone == alone + 2 * (root + layers[0]) * 2  # sent and then summed over both copies


def test_rows_that_are_shared_take_their_part_of_memory_and_work():
    """Two GPUs: full attention exchanges queries, keys, values and outputs, KDA its gates too; half goes away."""
    config = run(losses=HIDDEN, sequence_length=1024, frozen_res=FROZEN, parallel={"context": 2})
    whole = simulated(run(losses=HIDDEN, sequence_length=1024, frozen_res=FROZEN), "llama", cuda=True)
    shared = simulated(config, "llama", cuda=True, processes=Processes(2, parallel=config.parallel))
    for moment, flops in whole.flops.items():
        assert shared.flops[moment] == pytest.approx(flops / 2, rel=1e-3)
    assert shared.attention_flops == whole.attention_flops / 2
    assert shared.memory["activations"] == pytest.approx(whole.memory["activations"] / 2, rel=0.05)
    full, kda = 64 + 32 + 32 + 64, 3 * 64 + 64 + 4 + 64
    numbers = 2 * full + 2 * (full + kda)  # through the teacher, then through the student and back, in bfloat16
    assert shared.traffic.kinds["all-to-all"] == numbers * 2 * 2 * 512 / 2
    assert not divided_rows()


def test_links_and_network_carry_their_shares_at_a_time():
    """A gather over two nodes of four GPUs: 7/8 of it, a quarter of that out of the node by each GPU."""
    processes = Processes(4, 2, ParallelConfig())
    traffic = processes.traffic(
        [Collective("all-gather", 800, range(8), False), Collective("all-gather", 80, range(8), True)]
    )
    assert traffic.kinds == {"all-gather": 770}
    assert (traffic.between, traffic.inside, traffic.between_alone) == (192.5, 577.5, 17.5)
    all_seconds, alone = traffic.seconds(find_gpu("H100"))
    assert all_seconds == pytest.approx(192.5 / (NETWORK * LINK_SHARE)) and alone == pytest.approx(all_seconds / 11)
    exchanged = processes.traffic([Collective("all-to-all", 800, range(8), True)])
    assert (exchanged.inside, exchanged.between) == (300, 400)
    copies = Processes(4, 2, ParallelConfig(shard=4, replicate=2))
    summed = copies.traffic([Collective("all-reduce", 100, (0, 4), False)])
    assert (summed.inside, summed.between) == (0, 100)


def test_the_slower_of_work_and_communication_limits_a_step():
    assert (StepTime(3.0, 1.0, 0.5).total, StepTime(3.0, 1.0, 0.5).limit) == (3.5, "computing")
    assert (StepTime(3.0, 5.0, 0.5).total, StepTime(3.0, 5.0, 0.5).limit) == (5.0, "communication")


@pytest.fixture
def wide(tmp_path):
    """A run whose whole models do not fit on an RTX-5090, and whose quarters do."""
    shape = {"hidden_size": 2048, "intermediate_size": 196608}
    teacher = teacher_folder(tmp_path / "wide", "arcee", **shape)
    arguments = {"per_device_train_batch_size": 1, "gradient_checkpointing": True}

    def described(**keys):
        return run(teacher, text_file(tmp_path), arguments={**arguments, **keys.pop("arguments", {})}, **keys)

    return described


def test_several_gpus_are_told_to_divide_what_does_not_fit_on_one(wide):
    whole, divided = (plan_run(wide(**keys), gpu="RTX-5090", gpus=4) for keys in ({}, {"parallel": {"shard": "auto"}}))
    memory = [plan.phases[0].memory / 2**30 for plan in (whole, divided)]
    said = next(line for line in whole.warnings if line.startswith("parallel: "))
    assert said == (
        f"parallel: is missing, and whole models do not fit: {memory[0]:.1f} GiB of RTX-5090's 31.4; "
        f"write parallel: {{shard: auto}}, with which each GPU has {memory[1]:.1f} GiB"
    )
    assert divided.fits and not any(line.startswith("parallel: ") for line in divided.warnings)
    refused = plan_run(wide(arguments={"optim": "adamw_8bit"}), gpu="L4", gpus=4)
    assert not any(line.startswith("parallel: ") for line in refused.warnings)


def test_a_plan_tells_of_each_gpu_and_of_its_links(wide):
    config = wide(parallel={"shard": 2, "replicate": 2}, arguments={"gradient_accumulation_steps": 3})
    plan = plan_run(config, gpu="L4", nodes=2)
    assert (plan.gpus, plan.nodes, plan.shard, plan.replicate) == (4, 2, 2, 2)
    assert plan.phases[0].schedule.tokens_per_step == 4 * 3 * 256
    data = json.loads(json.dumps(plan.as_dict()))["phases"][0]
    assert data["step"]["total"] > data["step"]["alone"] > 0
    assert data["cost"]["traffic"]["between"] == data["cost"]["traffic"]["kinds"]["all-reduce"]
    assert plan.phases[0].tokens_per_second == pytest.approx(4 * 3 * 256 / data["step"]["total"])
    text = printed(plan)
    for line in (
        "2 nodes of 2 x L4",
        "models divided over │ 2 GPUs, 2 copies",
        "gathered weights",
        "all-reduce per step",
    ):
        assert line in " ".join(text.split()).replace("  ", " "), line
    assert "limited by" in text and "between nodes, at 80% of 50 GB/s" in text


def test_groups_that_share_rows_read_as_many_as_there_are(wide):
    plan = plan_run(wide(parallel={"context": 2}), gpu="L4", gpus=4)
    phase = plan.phases[0]
    assert (plan.context, phase.micro_batch, phase.schedule.tokens_per_step) == (2, 128, 2 * 256)
    assert "rows divided over │ 2 GPUs" in " ".join(printed(plan).split())


def test_gpus_that_parallel_does_not_divide_are_refused(wide):
    with pytest.raises(UserError, match=r"^parallel: shard 3 × replicate 1 needs 3 processes, and there are 8; "):
        plan_run(wide(parallel={"shard": 3}), gpus=4, nodes=2)
