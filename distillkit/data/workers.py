"""Processes that share the tokenising of a text: how many, with how many threads, and how they are interrupted."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import multiprocess
from datasets import Dataset

_BYTES_PER_PROCESS = 2**23
_THREADS = "TOKENIZERS_PARALLELISM"


def processes_for(rows: Dataset) -> int | None:
    """How many processes tokenise, where nobody says: at most one for each CPU, and each with some seconds of work."""
    size = rows.data.nbytes * len(rows) // rows.data.num_rows
    count = min(len(os.sched_getaffinity(0)), len(rows), size // _BYTES_PER_PROCESS)
    return count if count > 1 else None


@contextmanager
def one_thread_each(num_proc: int | None) -> Iterator[None]:
    """Within it, tokenizers of other processes start no threads, of which each would start one for each CPU.

    datasets sees to that, too, even for one process, but leaves it so for this one.
    """
    before = os.environ.get(_THREADS)
    if num_proc is not None:
        os.environ[_THREADS] = "false"
    try:
        yield
    finally:
        os.environ.pop(_THREADS, None)
        if before is not None:
            os.environ[_THREADS] = before


@contextmanager
def interruptions_as_they_are() -> Iterator[None]:
    """Within it a KeyboardInterrupt stays one: datasets asks processes for results then, and has none in time."""
    try:
        yield
    except multiprocess.TimeoutError as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
