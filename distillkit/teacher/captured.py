"""A teacher whose word was captured and lies in the dataset, as a codec stores it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from distillkit.compression import Codec
from distillkit.distribution import Distribution
from distillkit.teacher.signal import TeacherSignal


@dataclass(frozen=True)
class CapturedTeacher:
    """Reads what was stored: bytes travel with the batch, and a chunk of them at a time is decoded where they are.

    background: the log-distribution that mass outside the stored tokens may be taken to follow.
    """

    codec: Codec
    background: Float[Tensor, " vocab"] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the dataset, and names in the batch."""
        return self.codec.columns

    @property
    def vocabulary_size(self) -> int:
        """Columns of the head of the model that was captured."""
        return self.codec.vocabulary_size

    @torch.no_grad()
    def signal(self, batch: Mapping[str, Tensor]) -> TeacherSignal:
        """The teacher's word on the batch's `columns`, each [batch, tokens, width]."""
        stored = {name: batch[name].flatten(0, 1) for name in self.columns}
        device = batch[self.columns[0]].device
        background = None if self.background is None else self.background.to(device)

        def distribution(rows: Tensor) -> Callable[[slice], Distribution]:
            def decoded(chunk: slice) -> Distribution:
                wanted = rows[chunk]
                said = self.codec.decode({name: values[wanted] for name, values in stored.items()})
                return replace(said, background=background)

            return decoded

        return TeacherSignal(distribution)
