"""A teacher whose outputs are columns of the dataset, stored by a codec."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from distillkit.compression import Codec
from distillkit.config.errors import UserError
from distillkit.data import collate
from distillkit.data.signals import TensorRows
from distillkit.distribution import Distribution
from distillkit.teacher.teacher import DISTRIBUTION, SignalRequest, Teacher, TeacherSignal


class CapturedTeacher(Teacher):
    """Decodes the bytes of a batch on the batch's device, a chunk of positions at a time.

    Args:
        codec: how the outputs are stored; its columns are columns of the dataset and keys of the batch.
        background: log-distribution of the probability outside the stored tokens.
    """

    def __init__(self, codec: Codec, background: Float[Tensor, " vocab"] | None = None) -> None:
        self.codec = codec
        self.background = background
        self.columns = codec.columns

    @property
    def vocabulary_size(self) -> int:
        return self.codec.vocabulary_size

    @torch.no_grad()
    def signal(self, batch: Mapping[str, Tensor], request: SignalRequest = DISTRIBUTION) -> TeacherSignal:
        """From the batch's `columns`, each [batch, tokens, width]. Raises ValueError for all but distributions."""
        if request.hidden_states or request.attention:
            raise ValueError("a captured teacher has neither hidden states nor attention outputs")
        stored = {name: batch[name].flatten(0, 1) for name in self.columns}
        device = batch[self.columns[0]].device
        background = None if self.background is None else self.background.to(device)

        def distribution(rows: Tensor) -> Callable[[slice], Distribution]:
            def decoded(chunk: slice) -> Distribution:
                wanted = rows[chunk]
                distribution = self.codec.decode({name: values[wanted] for name, values in stored.items()})
                return replace(distribution, background=background)

            return decoded

        return TeacherSignal(distribution)

    def check_rows(self, rows: Dataset, key: str) -> None:
        """Raises UserError where the first row does not decode: another width, ids outside the vocabulary."""
        batch = collate([TensorRows(rows, self.columns)[0]], pad_token_id=0, signal_columns=self.columns)
        try:
            first = self.codec.decode({name: batch[name].flatten(0, 1) for name in self.columns})
        except UserError as error:
            raise UserError(key, str(error)) from None
        largest = int(first.ids.max())
        if largest >= self.vocabulary_size or bool(first.logprobs.isnan().any()):
            raise UserError(
                key,
                f"decoded as {self.codec.kind}, its first row holds token {largest} of a vocabulary of "
                f"{self.vocabulary_size}; give the configuration that the dataset was captured with",
            )
