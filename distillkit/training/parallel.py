"""Where models and batches meet several processes: the one place where they are divided.

Models are made, frozen and cast without knowing of it. Today each process holds both models whole and reads batches of
its own; what divides a model or a row comes here.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, TrainingArguments

from distillkit.config import UserError
from distillkit.console import FAILED, USAGE_ERROR

Result = TypeVar("Result")


def place_model(model: PreTrainedModel, arguments: TrainingArguments) -> PreTrainedModel:
    """The model where this process trains or runs it: whole, on its device."""
    return model.to(arguments.device)


def divide_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """This process's part of a batch that it has read: all of it."""
    return batch


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
