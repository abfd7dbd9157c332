"""Where models and batches meet several processes: the one place where they are divided.

Models are made, frozen and cast without knowing of it. Without `parallel` each process holds both models whole. With it
they are divided by PyTorch's FSDP2 (`fully_shard`): each process keeps a part of every parameter, of its gradient and
of its optimizer state, in the dtype that the parameter has. It reads these parts alone from the models' files. A
decoder layer is whole on a device only while it computes. Embeddings, final norm, head and projections are whole for
the length of a step, since the chunked losses use the head outside of any module's forward; so is attention where
losses compare its outputs, for the same reason. All processes must do the same forward passes.
"""

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel, TrainingArguments

from distillkit.config import UserError
from distillkit.config.parallel import ParallelConfig
from distillkit.console import FAILED, USAGE_ERROR
from distillkit.models.divided_rows import whole_rows
from distillkit.models.streaming import StoredModel
from distillkit.training.distiller import Distiller

Result = TypeVar("Result")
Mesh = DeviceMesh | None
"""The processes over which models are divided, [replicate, shard] or [shard]; None where each holds them whole."""


def mesh_of(parallel: ParallelConfig | None, processes: int, device: torch.device) -> Mesh:
    """The mesh that `parallel` describes. Raises `UserError` where the processes are not as many."""
    if parallel is None:
        return None
    replicate, shard = parallel.sizes(processes)
    if shard == 1:
        return None
    sizes = {"replicate": replicate, "shard": shard} if replicate > 1 else {"shard": shard}
    return mesh_over(device, **sizes)


def mesh_over(device: torch.device, **sizes: int) -> DeviceMesh:
    """All processes in axes of these names and sizes. One is made once: its groups keep memory of a GPU."""
    return _mesh(torch.distributed.group.WORLD, device.type, tuple(sizes.items()))


@lru_cache(maxsize=4)
def _mesh(processes: Any, device_type: str, sizes: tuple[tuple[str, int], ...]) -> DeviceMesh:
    """processes: the group of all of them, another after they have parted and met again."""
    names, numbers = zip(*sizes, strict=True)
    return init_device_mesh(device_type, numbers, mesh_dim_names=names)


def place_teacher(
    model: PreTrainedModel, device: torch.device, mesh: Mesh, stored: StoredModel | None = None
) -> PreTrainedModel:
    """The teacher where this process runs it; of one that is divided, the head is whole on each device.

    stored: the files of one that is on the meta device. Raises `UserError` for NaN and infinity in them.
    """
    if mesh is None:
        return model.to(device)
    model.requires_grad_(False)
    decoder, whole = model.get_decoder(), {*model.get_output_embeddings().parameters()}
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(decoder, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    if stored is not None:
        _read(model, stored, device)
    for parameter in model.get_output_embeddings().parameters():
        parameter.data = parameter.data.to(device)
    return model


def place_student(model: PreTrainedModel, device: torch.device, mesh: Mesh) -> PreTrainedModel:
    """The student where this process trains it. One that is to be divided waits on the CPU for `divide`."""
    return model if mesh is not None else model.to(device)


def divide(distiller: Distiller, device: torch.device, mesh: Mesh, stored: StoredModel | None = None) -> Distiller:
    """The student and its projections, frozen and cast as they train, divided over the mesh.

    stored: the files of a student on the meta device. Raises `UserError` for NaN and infinity in them.
    """
    if mesh is None:
        return distiller
    for projection in distiller.objective.parameters():  # random, unlike what is loaded
        projection.data = projection.data.to(device)
        torch.distributed.broadcast(projection.data, 0)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # sums of bf16 gradients over processes would round
    beside = _beside_bfloat16(distiller)
    if beside:  # what is gathered together trains in one dtype: those in float32 are gathered with the root
        fully_shard(distiller, mesh=mesh, mp_policy=policy, ignored_params={*distiller.parameters()} - beside)
        beside = {parameter for parameter in distiller.parameters() if isinstance(parameter, DTensor)}
    for part in _parts(distiller):
        fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=beside)
    if beside:
        fully_shard(distiller.student, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=beside)
        distiller.register_forward_pre_hook(lambda *_: _gather(distiller.student))
    else:
        fully_shard(distiller, mesh=mesh, mp_policy=policy)
    if stored is not None:
        _read(distiller.student, stored, device)
    register_fsdp_forward_method(distiller, "within")
    return distiller


def _read(model: PreTrainedModel, stored: StoredModel, device: torch.device) -> None:
    """Read what is on the meta device from its files, and of what is divided this process's part."""
    problem: tuple[str | None, str] | None = None
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))
    found: dict[int, Tensor] = {}  # a tensor that two modules share is read once
    try:
        for name, tensor in named.items():
            if tensor.is_meta:
                owner, _, attribute = name.rpartition(".")
                if id(tensor) not in found:
                    found[id(tensor)] = _part(tensor, name, stored, device)
                setattr(model.get_submodule(owner), attribute, found[id(tensor)])
    except UserError as error:
        problem = error.key, error.problem
    problems: list[tuple[str | None, str] | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    for each in filter(None, problems):
        raise UserError(*each)


def _part(tensor: Tensor, name: str, stored: StoredModel, device: torch.device) -> Tensor:
    """What this process has of a tensor that is on the meta device."""
    if isinstance(tensor, DTensor):
        mesh, placements = tensor.device_mesh, tensor.placements
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
        local = stored.read(name, range(offset[0], offset[0] + shape[0])).to(device)
        part: Tensor = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
    else:
        part = stored.read(name).to(device)
    return nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part


def _beside_bfloat16(distiller: Distiller) -> set[nn.Parameter]:
    """What trains in float32 where others train in bf16: projections, and what an architecture keeps in float32."""
    trained = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    wide = {parameter for parameter in trained if parameter.dtype == torch.float32}
    return wide if len(wide) < len(trained) else set()


def _gather(student: nn.Module) -> None:
    """Have those parameters whole that are so for a step, where they are not the root's."""
    if isinstance(student, FSDPModule):
        student.unshard()


def _parts(distiller: Distiller) -> Iterable[nn.Module]:
    """What is whole on a device only while it runs."""
    for layer in distiller.student.get_decoder().layers:
        if not distiller.objective.attention_layers:
            yield layer
            continue
        for name, part in layer.named_children():
            if name != "self_attn" and any(parameter.dim() > 1 for parameter in part.parameters()):
                yield part


def within(distiller: Distiller, work: Callable[[], Result]) -> Result:
    """What `work` returns, which uses the student outside of a training step. All processes do it."""

    def gathered() -> Result:
        _gather(distiller.student)
        return work()

    with whole_rows():
        result: Result = distiller.within(gathered)
    for module in (distiller, distiller.student):
        if isinstance(module, FSDPModule):
            module.reshard()
    return result


def is_divided(model: nn.Module) -> bool:
    """Whether a part of it is on other processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def shards(model: nn.Module) -> int:
    """Into how many parts its parameters are divided."""
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            sizes = zip(parameter.device_mesh.shape, parameter.placements, strict=True)
            return math.prod(size for size, placement in sizes if placement.is_shard())
    return 1


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model; of a divided one all processes gather it, and the main process alone has it, on the CPU.

    There a tensor has one name, also where two modules share it.
    """
    if not is_divided(model):
        return model.state_dict()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    others = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    return {name: tensor for name, tensor in state.items() if name not in others and isinstance(tensor, Tensor)}


def main_process_first(arguments: TrainingArguments, work: Callable[[], Result]) -> Result:
    """What `work` returns. The main process does it before the others, which find what it left on disk.

    It is the first of all processes, not of each machine's: `output_path` is a folder that all machines share. Where it
    fails on the main process it fails on all: that process raises, the others exit silently.
    """
    if arguments.world_size == 1:
        return work()
    if arguments.process_index > 0:
        exit_codes: list[int | None] = [None]
        broadcast_object_list(exit_codes)
        if exit_codes[0] is not None:
            raise SystemExit(exit_codes[0])
        return work()
    try:
        result = work()
    except Exception as error:
        broadcast_object_list([USAGE_ERROR if isinstance(error, UserError) else FAILED])
        raise
    broadcast_object_list([None])
    return result


def any_process(arguments: TrainingArguments, *flags: bool) -> tuple[bool, ...]:
    """For each flag, whether it is set on any process."""
    if arguments.world_size == 1:
        return flags
    values = torch.tensor(flags, dtype=torch.int32, device=arguments.device)
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return tuple(bool(flag) for flag in values.tolist())
