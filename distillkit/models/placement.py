"""Where a teacher that does not fit beside its student lies: on GPUs of its own, or in the CPU's memory."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import cpu_offload
from torch import Tensor
from transformers import PreTrainedModel

from distillkit.config.errors import UserError


def offload_layers(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model with embeddings, final norm and head on the device, and its layers where they are.

    By accelerate's hooks, which copy a layer just before it runs. Page-locked memory makes that quick, but the GPU
    waits for it.
    """
    layers = model.get_decoder().layers
    elsewhere = {id(tensor) for layer in layers for tensor in (*layer.parameters(), *layer.buffers())}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in elsewhere:
            tensor.data = tensor.data.to(device)
    for layer in layers:
        weights = {name: _pinned(tensor, device) for name, tensor in layer.state_dict().items()}
        cpu_offload(layer, device, state_dict=weights, preload_module_classes=[type(layer).__name__])
    return model


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor


def own_devices(devices: Sequence[int]) -> dict[str, Any]:
    """Arguments of `from_pretrained` that lay a model's layers, in order, over this process's share of GPUs.

    devices: numbers on this machine, which the processes that torchrun started here share equally.

    Raises `UserError` where they cannot, or for a GPU that does not exist or trains a student.
    """
    # srun and mpirun set the number of all processes only.
    processes = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", "1")
    mine = devices_of_process(devices, int(os.environ.get("LOCAL_RANK", "0")), int(processes))
    if (there := torch.cuda.device_count()) <= max(devices):
        raise UserError("teacher.devices", f"GPU {max(devices)} does not exist; this machine has {there}")
    return {"device_map": "balanced", "max_memory": {each: torch.cuda.mem_get_info(each)[0] for each in mine}}


def refuse_spilled(model: PreTrainedModel) -> None:
    """Raises `UserError` for a model that did not fit on GPUs of its own: accelerate leaves the rest on the disk."""
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise UserError("teacher.devices", "the teacher does not fit on them; name more GPUs, or add quantization")


def devices_of_process(devices: Sequence[int], process: int, processes: int) -> Sequence[int]:
    """Those of one of the machine's processes, each of which trains on the GPU of its own number."""
    share, rest = divmod(len(devices), processes)
    if rest or not share:
        raise UserError("teacher.devices", f"{processes} processes cannot share {len(devices)} GPUs equally")
    if min(devices) < processes:
        raise UserError("teacher.devices", f"GPU {min(devices)} trains a student; name others, from {processes} on")
    return devices[share * process : share * (process + 1)]
