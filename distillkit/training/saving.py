"""Writing a student so that it can be loaded as any model: weights, configuration, generation configuration."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel


def save_student(
    student: PreTrainedModel, folder: Path, dtype: torch.dtype, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Save a student as safetensors. Its config declares `dtype`, to which the weights are cast when loaded.

    The weights are written as they are: those of a checkpoint include float32 masters.
    """
    student.save_pretrained(folder, state_dict=state_dict)
    student.config.dtype = dtype
    student.config.save_pretrained(folder)
