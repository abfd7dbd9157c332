"""A simulated step takes what a real one takes: the product's own modules are run both ways."""

import resource
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from distillkit.conversion.convert import student_on_meta
from distillkit.losses import Objective, shifted_labels
from distillkit.planning.meta_models import student_config, student_model, teacher_on_meta
from distillkit.planning.processes import Processes
from distillkit.planning.settings import Settings
from distillkit.planning.step import COMPILED, chunk_tokens, simulate_step
from distillkit.teacher.live import LiveTeacher
from distillkit.training.distiller import Distiller
from distillkit.training.freezing import freeze_matching
from distillkit.training.precision import cast_for_training
from distillkit.training.setup import checkpoint_layers
from distillkit.training.wiring import objective_of, signal_request
from tests.planning.small import ATTENTION, DISTRIBUTION, FROZEN, HIDDEN, run, teacher_config


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made within that are alive now, and the most that ever were."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {id(each.untyped_storage()) for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage(), given)
        return out

    def _see(self, storage, given):
        key = storage._cdata
        if key in self.known or id(storage) in given or storage.nbytes() == 0:
            return
        self.known.add(key)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key, size):
        self.known.discard(key)
        self.now -= size


def models(config, family):
    """Teacher and student with weights, the student frozen and cast as it trains."""
    torch.manual_seed(0)
    base = teacher_config(family)
    teacher = AutoModelForCausalLM.from_config(base, dtype=torch.bfloat16)
    student = student_on_meta(base, config.student).to_empty(device="cpu").float()
    for tensor in [*student.parameters(), *student.buffers()]:
        torch.nn.init.normal_(tensor.data, std=0.02)
    freeze_matching(student, config.frozen_res, [])
    cast_for_training(student, Settings.of(config).compute_dtype)
    return teacher, student


def real_step(config, family):
    """(bytes kept for the backward pass, most bytes alive) of a real step, weights apart."""
    settings = Settings.of(config)
    teacher, student = models(config, family)
    if settings.gradient_checkpointing:
        checkpoint_layers(student, {"use_reentrant": False})
    teacher = LiveTeacher(teacher)
    objective = objective_of(config, student, teacher, 512, chunk_tokens(config.loss_functions, 512, cuda=False))
    request = signal_request(objective, vocabulary_size=512)
    distiller = Distiller(student, objective).train()
    ids = torch.randint(512, (settings.batch_size, config.sequence_length))
    positions = torch.arange(config.sequence_length).repeat(settings.batch_size, 1)
    batch = {"input_ids": ids, "position_ids": positions, "targets": shifted_labels(ids)}
    dtype = settings.compute_dtype
    with LiveBytes() as live:
        signal = teacher.signal(batch, request)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = distiller(**batch, normalizer=torch.ones(()), signal=signal)
        del signal
        kept = live.now
        output["loss"].backward()
    return kept, live.most


def simulated(config, family, **options):
    base = teacher_config(family)
    student = student_model(config, student_config(config, base))
    freeze_matching(student, config.frozen_res, [])
    settings = Settings.of(config)
    cast_for_training(student, settings.compute_dtype)
    teacher = LiveTeacher(teacher_on_meta(base, config.teacher, False))
    return simulate_step(config, settings, teacher, student, **{"cuda": False, **options})


@pytest.mark.parametrize("family", ["llama", "arcee"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "checkpointing"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_kept_and_peak_are_those_of_a_real_step(family, checkpointing, bf16):
    arguments = {"bf16": bf16, "gradient_checkpointing": checkpointing}
    config = run(losses=HIDDEN, arguments=arguments, frozen_res=FROZEN)
    kept, most = real_step(config, family)
    cost = simulated(config, family)
    beside_weights = cost.memory["activations"] + cost.memory.get("gradients", 0)
    assert cost.kept == pytest.approx(kept, rel=0.15)
    assert beside_weights == pytest.approx(most, rel=0.15)


@pytest.mark.parametrize("losses", [DISTRIBUTION, ATTENTION], ids=["whole student", "alignment"])
def test_other_losses_take_what_they_take(losses):
    config = run(losses=losses, frozen_res=["embed_tokens"])
    kept, most = real_step(config, "llama")
    cost = simulated(config, "llama")
    assert cost.kept == pytest.approx(kept, rel=0.15)
    assert cost.memory["activations"] + cost.memory.get("gradients", 0) == pytest.approx(most, rel=0.15)


def test_what_autograd_saves_is_what_is_kept():
    """Counted by autograd's own hooks: unique storages, parameters apart."""
    config = run(losses=DISTRIBUTION[:1], frozen_res=FROZEN)
    _, student = models(config, "llama")
    parameters = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(512, (2, 256))
    batch = {"input_ids": ids, "position_ids": torch.arange(256).repeat(2, 1), "targets": shifted_labels(ids)}
    distiller = Distiller(student, Objective(config.loss_functions, None)).train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        output = distiller(**batch, normalizer=torch.ones(()))
    total = sum(size for pointer, size in saved.items() if pointer not in parameters)
    assert simulated(config, "llama").kept == pytest.approx(total, rel=0.15)
    del output


def test_frozen_weights_cost_no_gradient_and_no_product():
    """A step has three products for a weight that trains and two for one that does not."""
    everything = simulated(run(losses=DISTRIBUTION[:1]), "arcee")
    frozen = simulated(run(losses=DISTRIBUTION[:1], frozen_res=[r"\.mlp\."]), "arcee")
    tokens, mlp = 512, 2 * 2 * 64 * 256
    difference = sum(everything.flops.values()) - sum(frozen.flops.values())
    assert difference == 2 * mlp * tokens


def test_checkpointing_computes_the_layers_twice_and_keeps_less():
    plain = simulated(run(losses=DISTRIBUTION), "llama")
    checkpointed = simulated(run(losses=DISTRIBUTION, arguments={"gradient_checkpointing": True}), "llama")
    assert checkpointed.kept < plain.kept / 3
    assert checkpointed.flops["backward pass"] > 1.2 * plain.flops["backward pass"]


def test_accumulated_gradients_and_ranks_are_there_beside_the_activations():
    """After the first micro-batch gradients are alive for the whole step; DDP has buckets of the same size."""
    config = run(losses=DISTRIBUTION, arguments={"gradient_accumulation_steps": 4})
    several = simulated(config, "llama")
    ranks = simulated(config, "llama", processes=Processes(2))
    weights = student_model(config, student_config(config, teacher_config())).parameters()
    assert several.memory["gradients"] == 4 * sum(weight.numel() for weight in weights)
    assert ranks.memory["gradients"] == 2 * several.memory["gradients"]


def test_compiled_steps_keep_a_share_of_the_activations_on_cuda_alone():
    eager, compiled = run(losses=HIDDEN), run(losses=HIDDEN, arguments={"torch_compile": True})
    on_cuda = [simulated(each, "llama", cuda=True) for each in (eager, compiled)]
    assert on_cuda[1].kept == pytest.approx(COMPILED * on_cuda[0].kept, abs=1)
    assert on_cuda[1].memory["student weights"] == on_cuda[0].memory["student weights"]
    assert on_cuda[1].flops == on_cuda[0].flops
    assert simulated(compiled, "llama").memory == simulated(eager, "llama").memory
    checkpointed = [
        run(losses=HIDDEN, arguments={"torch_compile": compile, "gradient_checkpointing": True})
        for compile in (False, True)
    ]
    costs = [simulated(each, "llama", cuda=True) for each in checkpointed]
    assert costs[0].memory == costs[1].memory


def test_no_real_memory_is_taken():
    """More than a test may take is simulated: nothing has data."""
    config = run(losses=DISTRIBUTION, sequence_length=1024, arguments={"per_device_train_batch_size": 256})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cost = simulated(config, "llama", cuda=True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert cost.allocated > 6 * 2**30
