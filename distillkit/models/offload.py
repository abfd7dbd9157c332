"""A model whose decoder layers lie in the CPU's memory, and are on the GPU one at a time, while they compute."""

import torch
from accelerate import cpu_offload
from torch import Tensor
from transformers import PreTrainedModel


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
