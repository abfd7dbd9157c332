"""`parallel`: over how many processes the models of a run are divided."""

from typing import Annotated, Literal

from pydantic import Field

from distillkit.config.errors import UserError
from distillkit.config.section import Section

DIVIDED = "parallel: {shard: auto}"
"""What to write instead of other libraries' ways to divide models."""


class ParallelConfig(Section):
    """Groups of processes that hold one copy of the models together. A process has one GPU."""

    shard: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="processes that share one copy of parameters, gradients and optimizer states; auto: as many as "
        "there are, divided by replicate",
    )
    replicate: int = Field(1, gt=0, description="how many such copies there are")
    context: int = Field(
        1,
        gt=0,
        description="processes that share the tokens of each row, for long ones; it divides the number of processes",
    )
    async_checkpoints: bool | Literal["auto"] = Field(
        "auto",
        description="whether checkpoints are written in the background while training goes on, from a copy in the "
        "host's memory; auto: on GPUs",
    )

    def sizes(self, processes: int) -> tuple[int, int]:
        """(replicate, shard) for so many processes. Raises `UserError` where they are not shard × replicate.

        And where `context` does not divide them.
        """
        shard = max(1, processes // self.replicate) if self.shard == "auto" else self.shard
        wanted = self.replicate * shard
        if wanted != processes:
            raise UserError(
                "parallel",
                f"shard {self.shard} × replicate {self.replicate} needs {wanted} processes, and there are "
                f"{processes}; start with torchrun --nproc-per-node {wanted}, or change one of the two",
            )
        if processes % self.context:
            raise UserError(
                "parallel.context",
                f"{self.context} does not divide the {processes} processes; start as many as shard × replicate, or "
                "lower it",
            )
        return self.replicate, shard
