"""Numbers that train and numbers that rest.

A bf16 weight of 0.02 does not move at learning rate 1e-5: the update is smaller than half the distance to the next
bf16 number. So what trains is kept in float32 (master weights) and cast to bf16 where it is used, by autocast; what is
frozen is only ever used, and is stored in bf16. Without `training_args.bf16` all is float32.

`trained_weights: bfloat16` keeps no masters: the optimizer rounds stochastically (`training.optimizers`), so that a
weight of 0.02 moves by a bf16 step now and then, and by the right amount on average. Gradients are bf16 then, too.

What is saved at the end has the dtype that computed: bf16 after a bf16 run, so the saved student is the network that
the last forward pass used; float32 after a float32 run, so that nothing is rounded away. The divergence "after" is
measured on the student as saved. Checkpoints, from which a run resumes, keep the float32 masters.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments


def compute_dtype(args: TrainingArguments) -> torch.dtype:
    """The dtype of the student's matrix products, from `training_args`."""
    return torch.bfloat16 if args.bf16 else torch.float32


def bfloat16_is_slow(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 several times slower than in float32: x86 CPUs without AVX-512."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def cast_for_training(model: PreTrainedModel, dtype: torch.dtype, trained_dtype: torch.dtype = torch.float32) -> str:
    """Keep what trains in `trained_dtype` and what is frozen in `dtype`; a line that describes it.

    Modules that the architecture wants in float32 always (`_keep_in_fp32_modules_strict`) stay there.
    """
    for name, parameter in model.named_parameters():
        stored = trained_dtype if parameter.requires_grad else dtype
        parameter.data = parameter.data.to(torch.float32 if stays_float32(model, name) else stored)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    if dtype == torch.float32:
        return f"precision: float32 throughout ({trained:,} parameters train, {frozen:,} are frozen)"
    name = str(dtype).removeprefix("torch.")
    how = f"train as float32 master weights under {name} autocast"
    if trained_dtype != torch.float32:
        how = f"train in {name}, rounded stochastically"
    return f"precision: {trained:,} parameters {how}, {frozen:,} frozen ones are stored in {name}"


@torch.no_grad()
def cast_for_saving(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the whole model `dtype`, except what the architecture keeps in float32.

    A parameter that is divided over processes keeps its own dtype, and the values of `dtype`.
    """
    for name, parameter in model.named_parameters():
        if stays_float32(model, name):
            continue
        if isinstance(parameter, DTensor):
            parameter.copy_(parameter.to(dtype))
        else:
            parameter.data = parameter.data.to(dtype)


def cast_state(model: PreTrainedModel, state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters in a model's state as `cast_for_saving` casts them."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    cast = {name for name in parameters & state.keys() if not stays_float32(model, name)}
    return {name: tensor.to(dtype) if name in cast else tensor for name, tensor in state.items()}


def stays_float32(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers would load the parameter `name` in float32 even in a 16-bit model."""
    kept = model._keep_in_fp32_modules_strict or ()
    return any(part in kept for part in name.split("."))
