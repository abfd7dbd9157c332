"""Writing a student so that it can be loaded as any model: weights, configuration, generation configuration."""

import math
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from distillkit.config import UserError
from distillkit.formatting import byte_text
from distillkit.runs.checkpoints import complete_checkpoints
from distillkit.runs.fingerprints import files_in
from distillkit.runs.folder import PhaseFolder
from distillkit.runs.names import CARD, HTML, MARKDOWN, METRICS, RESULTS, RUN
from distillkit.runs.writing import flush, hard_link, write_whole
from distillkit.training.optimizer_memory import optimizer_memory

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


def student_files(folder: Path) -> dict[str, Path]:
    """The files of the student in a phase's folder, by name; what else the phase wrote there is none."""
    besides = (RUN, RESULTS, METRICS, CARD, HTML, MARKDOWN)
    return {name: path for name, path in files_in(folder).items() if name not in besides}


def link_student(source: Path, folder: Path) -> None:
    """Put the student of one folder into another too: its weights by hard links where there are any, else copied.

    Each file is there whole or not at all, whenever the process is killed; done again, it changes nothing.
    """
    for path in student_files(source).values():
        if path.suffix == _WEIGHTS:
            _link(path, folder / path.name)
        else:
            write_whole(folder / path.name, path.read_bytes())
    flush(folder)


def check_room(
    student: PreTrainedModel,
    arguments: TrainingArguments,
    folder: PhaseFolder,
    steps: int,
    by_the_clock: bool,
    dtype: torch.dtype,
    adapter_alone: bool = False,
) -> None:
    """Raises `UserError` where the disk has no room for the checkpoints that are certain to come, and the student.

    steps: of the whole phase. by_the_clock: checkpoints are written now and then, and one at the end. dtype: of the
    saved student. adapter_alone: all that a checkpoint holds is what trains.
    """
    if not folder.main_process:
        return
    parameters = list(student.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    stored = sum(parameter.nbytes for parameter in (trained if adapter_alone else parameters))
    checkpoint = stored + optimizer_memory(arguments.optim.value, trained, cuda=True).states
    saved = sum(parameter.numel() for parameter in parameters) * dtype.itemsize
    count = _checkpoints_to_come(arguments, folder, steps, by_the_clock)
    needed, free = count * checkpoint + saved, shutil.disk_usage(folder.path).free
    if needed > free:
        raise UserError(
            "output_path",
            f"has no room: {byte_text(free)} are free at {str(folder.path)!r}, but {count} more checkpoints of "
            f"{byte_text(checkpoint)} and the student need {byte_text(needed)}; free some, lower "
            "training_args.save_total_limit, or choose another output_path",
        )


def _checkpoints_to_come(arguments: TrainingArguments, folder: PhaseFolder, steps: int, by_the_clock: bool) -> int:
    """How many more there are at least at one time: while one is written, all that are kept are there, too."""
    left = steps - (0 if folder.checkpoint is None else folder.checkpoint.step)
    every = arguments.save_steps if arguments.save_steps >= 1 else max(1, steps * arguments.save_steps)
    written = math.ceil(left / every) if arguments.save_strategy == "steps" else min(1, left)
    if arguments.save_strategy == "no" and not by_the_clock:
        written = 0
    if not arguments.save_total_limit:
        return written
    kept = len(complete_checkpoints(folder.path))
    return min(written, max(1, arguments.save_total_limit + 1 - kept))


def _link(path: Path, target: Path) -> None:
    staged = target.with_name(f".{target.name}.linked")
    staged.unlink(missing_ok=True)  # of a process that was killed
    if not hard_link(path, staged):
        shutil.copyfile(path, staged)
        flush(staged)
    os.replace(staged, target)
    staged.unlink(missing_ok=True)  # it stays where both are links to one file already
