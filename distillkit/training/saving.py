"""Writing a student so that it can be loaded as any model: weights, configuration, generation configuration."""

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distillkit.runs.writing import flush, hard_link, write_whole

_WEIGHTS = ".safetensors"


def save_student(
    student: PreTrainedModel, folder: Path, dtype: torch.dtype, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Save a student as safetensors. Its config declares `dtype`, to which the weights are cast when loaded.

    The weights are written as they are: those of a checkpoint include float32 masters.
    """
    student.save_pretrained(folder, state_dict=state_dict)
    student.config.dtype = dtype
    student.config.save_pretrained(folder)


def link_student(source: Path, folder: Path, besides: tuple[str, ...]) -> None:
    """Put the student of one folder into another too: its weights by hard links where there are any, else copied.

    Each file is there whole or not at all, whenever the process is killed; done again, it changes nothing.

    besides: names of files in `source` that are no part of the student.
    """
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.name.startswith(".") or path.name in besides:
            continue
        if path.suffix == _WEIGHTS:
            _link(path, folder / path.name)
        else:
            write_whole(folder / path.name, path.read_bytes())
    flush(folder)


def _link(path: Path, target: Path) -> None:
    staged = target.with_name(f".{target.name}.linked")
    staged.unlink(missing_ok=True)  # of a process that was killed
    if not hard_link(path, staged):
        shutil.copyfile(path, staged)
        flush(staged)
    os.replace(staged, target)
    staged.unlink(missing_ok=True)  # it stays where both are links to one file already
