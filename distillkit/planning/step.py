"""One training step simulated: the run's own modules on tensors without data, in a ledger that counts.

What is estimated nowhere has not to be kept true: teacher, student, losses and autograd are those that will run. Only
three things stand in for others where the run is on CUDA: kernels of mixers (`Mixer.plan_on_cuda`), autocast's rules
(`cuda_rules`) and the padding of a vocabulary that is no multiple of 64. Models are divided as in the run, too, among
processes of which only the first is there.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from distillkit.config import LossConfig, RunConfig
from distillkit.config.losses import ATTENTION_FUNCTIONS, HIDDEN_STATE_FUNCTIONS
from distillkit.distribution import Distribution, SparseDistribution
from distillkit.losses.objective import CPU_CHUNK_BYTES, CUDA_CHUNK_BYTES
from distillkit.models.attention import trained_attention
from distillkit.models.chunked_logits import chunk_tokens_within
from distillkit.models.decoder import head
from distillkit.models.float8 import exchange
from distillkit.models.labels import shifted_labels
from distillkit.models.quantization import BYTES_PER_WEIGHT
from distillkit.models.varlen_attention import VARLEN
from distillkit.planning.cuda_rules import CudaAutocast
from distillkit.planning.ledger import ALL_REDUCE, Collective, Ledger, without_data
from distillkit.planning.processes import Processes, Traffic
from distillkit.planning.settings import Settings
from distillkit.student.mixers.registry import mixed_layers
from distillkit.teacher.live import LiveTeacher
from distillkit.teacher.teacher import DISTRIBUTION, SignalRequest, Teacher, TeacherSignal
from distillkit.training.context import divide_rows_of
from distillkit.training.distiller import Distiller
from distillkit.training.optimizer_memory import optimizer_memory
from distillkit.training.parallel import Mesh, divide, place_teacher
from distillkit.training.setup import checkpoint_layers
from distillkit.training.wiring import objective_of, signal_request

TEACHER_WEIGHTS, STUDENT_WEIGHTS = "teacher weights", "student weights"
TEACHER, FORWARD, BACKWARD, UPDATE = "teacher's pass", "student's forward pass", "backward pass", "optimizer step"

ALONE = Processes()
CPU = torch.device("cpu")

COMPILED = 0.66
"""Of an eager step's activations, what a compiled one takes in which nothing is checkpointed: 0.52 at AFM-4.5B's
shapes, 0.66 at SmolLM2's (one H100; benchmarks/results/throughput.json, throughput_smollm2.json). Compiled steps with
checkpointing took 0.6 to 0.9, and are planned as eager ones."""


@dataclass(frozen=True)
class StepCost:
    """What one micro-batch, and the optimizer step after it, take on one GPU.

    memory: bytes at the worst moment, by kind; they lie at that moment together. moment: when that is.
    kept: bytes kept from the student's forward pass for its backward pass. hidden_states: bytes of the teacher's
    hidden states and attention records. flops: floating point operations of a micro-batch, by moment.
    attention_flops, float8_flops: those of them that are softmax attention, and products in float8. chunk_tokens:
    tokens whose logits exist at one time. traffic: what the GPU sends to others in a micro-batch.
    """

    memory: dict[str, int]
    moment: str
    kept: int
    hidden_states: int
    flops: dict[str, float]
    attention_flops: float
    float8_flops: float
    chunk_tokens: int
    traffic: Traffic

    @property
    def allocated(self) -> int:
        return sum(self.memory.values())


def simulate_step(
    config: RunConfig,
    settings: Settings,
    teacher: Teacher,
    student: PreTrainedModel,
    *,
    cuda: bool,
    processes: Processes = ALONE,
) -> StepCost:
    """The cost of a step of `config`.

    teacher, student: on the meta device; the student frozen and cast as it trains. Both are used up.
    """
    ledger = Ledger()
    vocabulary = min(teacher.vocabulary_size, _rows(student))
    with processes.meshes() as (mesh, context), ledger:
        _materialize(student, ledger, STUDENT_WEIGHTS, config, settings, cuda)
        if config.frozen_precision is not None:
            with ledger.making(STUDENT_WEIGHTS):
                exchange(student, "frozen_precision")
        if context is not None:
            divide_rows_of(student, "model")
        if teacher.model is not None:
            _materialize(teacher.model, ledger, TEACHER_WEIGHTS, config, settings, cuda)
            if config.teacher.kind == "hf" and config.teacher.quantization == "float8":
                with ledger.making(TEACHER_WEIGHTS):
                    exchange(teacher.model, "teacher.quantization")
            if context is not None:
                divide_rows_of(teacher.model, "teacher.path")
            with ledger.making(TEACHER_WEIGHTS):
                teacher = LiveTeacher(_placed(teacher.model, config, mesh))
        chunk = chunk_tokens(config.loss_functions, _rows(student), cuda)
        with ledger.making(STUDENT_WEIGHTS):  # projections
            objective = objective_of(config, student, teacher, vocabulary, chunk)
        matrices = []
        if teacher.model is not None and objective.needs_teacher:
            matrices = _padding(teacher.model, ledger, TEACHER_WEIGHTS, cuda)
        if settings.gradient_checkpointing:
            _checkpoint_layers(student, settings, cuda)
        with ledger.making(STUDENT_WEIGHTS):
            distiller = divide(Distiller(student, objective).train(), CPU, mesh)
        top_k = config.teacher.top_k if config.teacher.kind == "hf" else None
        request = signal_request(objective, top_k=top_k, vocabulary_size=vocabulary)
        used = teacher if objective.needs_teacher else None
        batch = _batch(settings.batch_size, config.sequence_length)
        if context is not None:
            batch = context.part_of(batch)
        cost = _step(config, settings, ledger, distiller, used, request, batch, processes, cuda)
        del matrices
    return _with_smaller_teacher(cost, config, teacher.model)


def _with_smaller_teacher(cost: StepCost, config: RunConfig, teacher: PreTrainedModel | None) -> StepCost:
    """The same with the memory of weights that are quantised or elsewhere, which the simulation has as they were."""
    if config.teacher.kind != "hf" or teacher is None:
        return cost
    saved = 0
    if config.teacher.devices is not None:
        saved = cost.memory[TEACHER_WEIGHTS]
    elif (per_weight := BYTES_PER_WEIGHT.get(str(config.teacher.quantization))) is not None:
        heads = {teacher.get_output_embeddings()}
        weights = [part.weight for part in teacher.modules() if isinstance(part, nn.Linear) and part not in heads]
        saved = int(sum(weight.numel() * (weight.itemsize - per_weight) for weight in weights))
    elif config.teacher.offload is not None:
        sizes = [sum(each.nbytes for each in layer.parameters()) for layer in teacher.get_decoder().layers]
        saved = sum(sizes) - max(sizes)
    return replace(cost, memory={**cost.memory, TEACHER_WEIGHTS: cost.memory[TEACHER_WEIGHTS] - saved})


def _materialize(
    model: PreTrainedModel, ledger: Ledger, kind: str, config: RunConfig, settings: Settings, cuda: bool
) -> None:
    """Weights without data, and the attention that the run would use."""
    without_data(model, ledger, kind)
    if not cuda:
        return

    def count(flops: int) -> None:
        ledger.flops[ledger.moment] += flops

    for layer, mixer in mixed_layers(model):
        mixer.plan_on_cuda(layer, count)
    student = kind == STUDENT_WEIGHTS
    given = config.model_kwargs if student else getattr(config.teacher, "kwargs", {})
    dtype = settings.compute_dtype if student else model.dtype
    narrow = dtype in (torch.bfloat16, torch.float16)
    wanted = config.use_flash_attention and given.get("attn_implementation") != "sdpa"
    if wanted and narrow and not config.divides_rows:
        model.set_attn_implementation(VARLEN)


def _placed(teacher: PreTrainedModel, config: RunConfig, mesh: Mesh) -> PreTrainedModel:
    """The teacher divided, unless it is offloaded or quantised or placed by its own arguments."""
    given = config.teacher
    whole = given.kind != "hf" or given.offload or given.quantization or given.devices or "device_map" in given.kwargs
    return teacher if whole or mesh is None else place_teacher(teacher, CPU, mesh)


def _checkpoint_layers(student: PreTrainedModel, settings: Settings, cuda: bool) -> None:
    """As the run does; a layer that is run again in the backward pass has CUDA's rules as well."""
    options: dict[str, Any] = {"use_reentrant": False}
    if cuda:
        options["context_fn"] = lambda: (nullcontext(), CudaAutocast())
    if settings.checkpoint_every is not None:
        options["every_n_layers"] = settings.checkpoint_every
    checkpoint_layers(student, options)


def chunk_tokens(losses: list[LossConfig], rows: int, cuda: bool) -> int:
    """Tokens of which the vocabulary head makes logits at one time, for a head of so many rows."""
    configured = [loss.sparse_chunk_length for loss in losses if loss.sparse_chunk_length is not None]
    return min(configured, default=chunk_tokens_within(CUDA_CHUNK_BYTES if cuda else CPU_CHUNK_BYTES, rows))


def _step(
    config: RunConfig,
    settings: Settings,
    ledger: Ledger,
    distiller: Distiller,
    teacher: Teacher | None,
    request: SignalRequest,
    batch: dict[str, Tensor],
    processes: Processes,
    cuda: bool,
) -> StepCost:
    """A step that is not the first: the optimizer has its states, and micro-batches before left their gradients."""
    projections = list(distiller.objective.projections.parameters())
    trained = reached_by(distiller.student, config) + projections
    here = [each.to_local() if isinstance(each, DTensor) else each for each in trained]
    optimizer = optimizer_memory(settings.optim, here, cuda=cuda)
    with ledger.making("optimizer states"):
        states = _bytes(optimizer.states)
    reduced = 0
    if processes.count > processes.shard == 1:  # by DDP, which has buckets of that size
        reduced = sum(each.numel() * each.element_size() for each in trained)
    with ledger.making("gradients"):
        buckets = _bytes(reduced)
        if settings.accumulation > 1:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(ledger.book_gradient)
    ledger.fresh_peak()
    with ledger.during(TEACHER):
        signal = None if teacher is None else teacher.signal(batch, request)
    hidden_states = ledger.live["activations"]
    with ledger.during(FORWARD):
        padding = _padding(distiller.student, ledger, "activations", cuda) if distiller.objective.terms else []
        narrow, whole = settings.compute_dtype != torch.float32, processes.shard == 1
        autocast = torch.autocast("cpu", settings.compute_dtype, enabled=narrow, cache_enabled=whole)
        with autocast, CudaAutocast() if cuda else nullcontext():
            output = distiller(
                **batch,
                normalizer=torch.ones(()),
                preference_pairs={term.name: torch.ones(()) for term in distiller.objective.ranking_terms},
                signal=signal,
            )
        del padding, signal
    kept = ledger.live["activations"]
    with ledger.during(BACKWARD):
        torch.autograd.backward(output["loss"])
    del output
    with ledger.during(UPDATE):
        _bytes(optimizer.working)
    del states, buckets
    lean = settings.torch_compile and not settings.gradient_checkpointing and distiller.objective.needs_hidden_states
    share = COMPILED if lean and cuda else 1.0
    memory = {kind: size for kind, size in ledger.peak.items() if size}
    memory["activations"] = round(share * memory["activations"])
    sent = ledger.collectives
    if reduced:
        sent.append(Collective(ALL_REDUCE, reduced // settings.accumulation, range(processes.count), alone=False))
    return StepCost(
        memory=memory,
        moment=ledger.peak_moment,
        kept=round(share * kept),
        hidden_states=hidden_states,
        flops={moment: float(count) for moment, count in ledger.flops.items() if count},
        attention_flops=float(ledger.attention_flops),
        float8_flops=float(ledger.float8_flops),
        chunk_tokens=distiller.objective.chunk_tokens or 0,
        traffic=processes.traffic(sent),
    )


def reached_by(student: PreTrainedModel, config: RunConfig) -> list[nn.Parameter]:
    """The student's parameters that a loss gives a gradient; without one an optimizer has no states for a weight."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    functions = {loss.function for loss in config.loss_functions}
    if functions - {*HIDDEN_STATE_FUNCTIONS, *ATTENTION_FUNCTIONS}:
        return trained
    attention = {id(each) for parameters in trained_attention(student).values() for each in parameters}
    if not functions & {*HIDDEN_STATE_FUNCTIONS}:
        return [parameter for parameter in trained if id(parameter) in attention]
    embeddings = student.get_input_embeddings().weight
    return [each for each in trained if each is not head(student)[0] or each is embeddings]


def _batch(rows: int, tokens: int) -> dict[str, Tensor]:
    """Every row is one document and every token counts: the micro-batch of this size that costs most."""
    input_ids = torch.zeros(rows, tokens, dtype=torch.long)
    position_ids = torch.arange(tokens).repeat(rows, 1)
    return {"input_ids": input_ids, "position_ids": position_ids, "targets": shifted_labels(input_ids)}


def _padding(model: PreTrainedModel, ledger: Ledger, kind: str, cuda: bool) -> list[Tensor]:
    """The copy of a head whose rows are no multiple of 64, on CUDA (`models.chunked_logits.padded`)."""
    weight, _ = head(model)
    missing = -weight.shape[0] % 64
    if not cuda or not missing:
        return []
    with ledger.making(kind):
        return [torch.empty(weight.shape[0] + missing, weight.shape[1], dtype=torch.bfloat16)]


def _bytes(size: float) -> Tensor:
    return torch.empty(int(size) // 4, dtype=torch.float32)


def _rows(model: nn.Module) -> int:
    weight, _ = head(model)
    return int(weight.shape[0])


class FakeCapturedTeacher(Teacher):
    """Stands for a captured teacher: k tokens of each row, which come with the batches and are decoded by chunks."""

    def __init__(self, k: int, vocabulary_size: int, bytes_per_token: int) -> None:
        self.k = k
        self.bytes_per_token = bytes_per_token
        self._vocabulary_size = vocabulary_size

    @property
    def vocabulary_size(self) -> int:
        return self._vocabulary_size

    def signal(self, batch: Mapping[str, Any], request: SignalRequest = DISTRIBUTION) -> TeacherSignal:
        """The stored bytes are alive as long as the signal is."""
        stored = _bytes(self.bytes_per_token * batch["input_ids"].numel())

        def distribution(rows: Tensor) -> Callable[[slice], Distribution]:
            def of_chunk(chunk: slice) -> Distribution:
                count = len(rows[chunk]) if stored is not None else 0
                ids = torch.empty(count, self.k).long()
                return SparseDistribution(ids, torch.empty(count, self.k), torch.empty(self.vocabulary_size))

            return of_chunk

        return TeacherSignal(distribution)
