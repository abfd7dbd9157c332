"""How checkpoints of divided models are written: by all processes together, and in the background where that is wanted.

`torch.distributed.checkpoint` writes what each process has its part of; when all parts are there, the main process does
the rest, and what fails on one process fails on all. In the background all this is the work of one thread per process,
on a copy of the state in the host's memory. These threads have a group of processes of their own, and write one
checkpoint at a time, so that nothing they send meets what training sends.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed
from torch import Tensor
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.utils._pytree import tree_map_only
from transformers import TrainingArguments

from distillkit.config import UserError
from distillkit.config.parallel import ParallelConfig
from distillkit.config.training_args import QUANTIZED_OPTIMIZERS
from distillkit.runs.writing import is_full_disk
from distillkit.training.parallel import any_process

SHARDS = "shards"
"""Beside these: the number of parts."""


def writes_in_background(parallel: ParallelConfig | None, arguments: TrainingArguments) -> bool:
    """Whether training goes on meanwhile: on GPUs, if not said otherwise.

    Never for 8-bit and 4-bit states on a CPU, of which torchao makes no copies there.
    """
    on_cpu = arguments.device.type == "cpu"
    if parallel is None or (on_cpu and arguments.optim in QUANTIZED_OPTIMIZERS):
        return False
    return not on_cpu if parallel.async_checkpoints == "auto" else parallel.async_checkpoints


class CheckpointWriter:
    """Writes one checkpoint after another. All processes call the same methods in the same order.

    Args:
        background: `write` returns when the state is copied, and a later call raises what fails.
    """

    def __init__(self, arguments: TrainingArguments, *, background: bool) -> None:
        self.arguments = arguments
        self._group: Any = None
        if background:  # now, so that a network that does not let them meet is noticed before anything is trained
            timeout = timedelta(seconds=arguments.ddp_timeout)
            self._group = torch.distributed.new_group(backend="gloo", timeout=timeout)
        self._writing: Future[Any] | None = None
        self._folder = Path()

    def write(self, folder: Path, state: dict[str, Any], finish: Callable[[], None]) -> None:
        """Write the state to the folder; then the main process calls `finish`, in the background perhaps.

        Raises as `settle` does.
        """
        self.settle()
        self._folder, writer = folder, _Writer(folder, finish)
        if self._group is None:
            with self._causes_raised():
                distributed_checkpoint.save(state, storage_writer=writer)
        else:
            writing = distributed_checkpoint.async_save(state, storage_writer=writer, process_group=self._group)
            assert isinstance(writing, Future)
            self._writing = writing

    def poll(self) -> None:
        """Once in a step: raises as `settle` does, as soon as the writing has ended on all processes."""
        if self._writing is not None and not any_process(self.arguments, not self._writing.done())[0]:
            self.settle()

    def settle(self) -> None:
        """Wait until nothing is being written.

        Raises on all processes what failed on one, as `UserError` where a file could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            with self._causes_raised():
                writing.result()

    def wait(self) -> None:
        """Wait as `settle` does, and raise nothing."""
        if self._writing is not None:
            wait([self._writing])

    @contextmanager
    def _causes_raised(self) -> Iterator[None]:
        try:
            yield
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            if isinstance(cause, OSError) and not is_full_disk(cause):  # of a full disk the run itself has a line
                problem = f"{self._folder} could not be written: {cause}; earlier checkpoints are whole"
                raise UserError("output_path", f"{problem}; go on with --resume") from error
            raise cause from error


class _Writer(FileSystemWriter):
    """Calls `then` on the main process when the parts of all processes are on disk."""

    def __init__(self, folder: Path, then: Callable[[], None]) -> None:
        super().__init__(folder)
        self.then = then

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy on the CPU. PyTorch's own would need of 8-bit states what torchao does not have."""
        self.per_thread_copy_ahead = 0  # bytes on their way from the GPU while others are written
        copied: dict[str, Any] = tree_map_only(Tensor, lambda each: each.detach().to("cpu", copy=True), state_dict)
        return copied

    def finish(self, metadata: Any, results: Any) -> None:
        super().finish(metadata, results)
        self.then()


def check_shards(parts: Path, number: int, optim: str) -> None:
    """Raises `UserError` where an optimizer was written in another number of parts."""
    written = {SHARDS: 0}
    distributed_checkpoint.load(written, checkpoint_id=parts)
    if written[SHARDS] != number:
        raise UserError(
            "parallel.shard",
            f"{parts.parent} was written with shard {written[SHARDS]}, and {optim} keeps blocks of numbers together, "
            f"which shard {number} would divide otherwise; resume with shard {written[SHARDS]}",
        )
