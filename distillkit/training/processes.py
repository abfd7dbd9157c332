"""What one of several processes does for all: opens the run's folder, converts, verifies, tokenises.

It is the first of all processes, not of each machine's: `output_path` is a folder that all machines share.
"""

from collections.abc import Callable
from typing import TypeVar

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from distillkit.config import UserError

Result = TypeVar("Result")


def main_process_first(arguments: TrainingArguments, work: Callable[[], Result]) -> Result:
    """What `work` gives. The first process does it before the others, which find what it left on disk.

    Where it fails on the first process, it fails on all: that process raises, the others exit without a word.
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
        broadcast_object_list([2 if isinstance(error, UserError) else 1])  # as the command line exits
        raise
    broadcast_object_list([None])
    return result
