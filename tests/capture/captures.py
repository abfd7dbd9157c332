"""Small captures: a random teacher, a text, a configuration, and what is in the folder afterwards."""

import io

import pyarrow.parquet as pq
from rich.console import Console

from distillkit.capture.run import capture
from distillkit.config.capture import CaptureConfig

VOCABULARY = 259
PLAIN = {"plain": {"k": 5, "vocab_size": VOCABULARY}}


def configuration(teacher, text, folder, /, **changes):
    described = {
        "teacher": {"path": str(teacher)},
        "sequence_length": 24,
        "dataset": {"train_dataset": {"disk_path": str(text)}},
        "compression": PLAIN,
        "output_path": str(folder),
        "rows_per_shard": 8,
        "tokens_per_batch": 128,
    }
    return CaptureConfig.parse({**described, **changes})


def run(config, share=None):
    """What the capture printed, on lines of any length."""
    console = Console(file=io.StringIO(), width=400)
    try:
        capture(config, share, console)
    finally:
        printed = console.file.getvalue()
    return printed


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows_of(folder):
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
