"""What a configuration may say and a run cannot do yet. The list shrinks as things get built."""

from collections.abc import Iterator

from distillkit.config.errors import UserError
from distillkit.config.run import RunConfig


def unbuilt(config: RunConfig) -> Iterator[str]:
    """One line for each thing that the run would need and that is not there."""
    if config.teacher.kind != "hf":
        yield f"teacher.kind: {config.teacher.kind} is not built yet; use kind: hf"
    for position, loss in enumerate(config.loss_functions):
        if loss.missing_probability_handling == "background":
            key = f"loss_functions[{position}].missing_probability_handling"
            yield f"{key}: background is not built yet; use zero or symmetric_uniform"
    if config.resize_embeddings_to_multiple_of is not None:
        yield "resize_embeddings_to_multiple_of: is not built yet; remove it"


def refuse_unbuilt(config: RunConfig) -> None:
    """Raises `UserError` for the first thing that is not built yet."""
    for line in unbuilt(config):
        raise UserError(line)
