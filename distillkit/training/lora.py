"""Students of which an adapter of low rank is trained (LoRA), by peft.

peft puts its layers into the student where it is, so all else works on a model as any other. A checkpoint holds the
adapter alone, beside the optimizer; the weights below it are read from where the student came from. At the end the
adapter is saved for peft (`adapter`), and then merged: the student that is saved and measured is an ordinary one.
"""

import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from distillkit.config.errors import UserError
from distillkit.config.lora import LoraConfig
from distillkit.training.freezing import Freezing

ADAPTER = "adapter"
"""Folder of the adapter, in a checkpoint and in a phase's folder."""


def add_adapter(student: PreTrainedModel, settings: LoraConfig, origin: str) -> tuple[Any, Freezing]:
    """peft's model around the student, which has adapters from here on and trains nothing else.

    origin: where the student's weights come from, which the adapter's files will name.

    Raises `UserError` where peft is not installed, or a name is of no linear layer.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model
    except ImportError:
        raise UserError("lora", "needs peft: pip install 'distillkit[lora]'") from None
    linear = [(name, part) for name, part in student.named_modules() if isinstance(part, nn.Linear)]
    for index, wanted in enumerate(settings.target_modules):
        named = [part for name, part in linear if name == wanted or name.endswith(f".{wanted}")]
        if not named:
            raise UserError(f"lora.target_modules[{index}]", f"{wanted!r} names no linear layer of the student")
        if student.get_output_embeddings() in named:  # whatever this architecture calls it
            raise UserError(f"lora.target_modules[{index}]", "the losses read its weight itself; name others")
    config = PeftConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=origin,
    )
    on_meta = student.device.type == "meta"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft does not know the new name of a property
        adapter = get_peft_model(student, config, autocast_adapter_dtype=False, low_cpu_mem_usage=on_meta)
    parameters = list(student.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return adapter, Freezing(trainable, sum(parameter.numel() for parameter in parameters) - trainable, [])


def save_adapter(adapter: Any, folder: Path) -> None:
    """As peft's own files."""
    adapter.save_pretrained(folder / ADAPTER, save_embedding_layers=False)


def load_adapter(adapter: Any, checkpoint: Path) -> None:
    """Read the adapter of a checkpoint. Raises `UserError` where it is not there, or another one."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    path = checkpoint / ADAPTER / "adapter_model.safetensors"
    try:
        found, wanted = load_file(path), get_peft_model_state_dict(adapter, save_embedding_layers=False)
        if {name: tensor.shape for name, tensor in found.items()} != {
            name: tensor.shape for name, tensor in wanted.items()
        }:
            raise RuntimeError("its tensors are others")
    except (OSError, SafetensorError, RuntimeError) as error:
        problem = " ".join(str(error).split())
        raise UserError("output_path", f"{path} does not hold the adapter of this run: {problem}") from error
    set_peft_model_state_dict(adapter, found)


def merge_adapter(adapter: Any) -> None:
    """Add the adapter to the student's weights, in float32; its layers are the student's own again.

    Added to 16-bit weights, most of a small update would be rounded away before the next phase goes on with it.
    """
    for part in adapter.modules():
        if hasattr(part, "get_base_layer"):
            part.get_base_layer().float()
    adapter.merge_and_unload()
