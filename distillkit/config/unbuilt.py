"""What a configuration may say and a run cannot do yet. The list shrinks as things get built."""

from collections.abc import Iterator

from distillkit.config.errors import UserError
from distillkit.config.run import RunConfig


def unbuilt(config: RunConfig) -> Iterator[str]:
    """One line for each thing that the run would need and that is not there."""
    if config.teacher.kind == "vllm":
        yield "teacher.kind: vllm is not built yet; use kind: hf, or capture the teacher first and use kind: dataset"


def refuse_unbuilt(config: RunConfig) -> None:
    """Raises `UserError` for the first thing that is not built yet."""
    for line in unbuilt(config):
        raise UserError(*line.split(": ", 1))
