"""A teacher whose outputs are columns of the dataset, stored by a codec."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Bool, Float
from torch import Tensor

from distillkit.compression import Codec
from distillkit.config.errors import UserError
from distillkit.data import collate
from distillkit.data.signals import TensorRows
from distillkit.distribution import Distribution, SparseDistribution
from distillkit.teacher.teacher import DISTRIBUTION, SignalRequest, Teacher, TeacherSignal

ROWS_CHECKED = 64
"""Number of rows that are decoded before a run starts."""


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
        self._strange: Tensor | None = None
        self._seen = torch.zeros((), dtype=torch.bool)

    @property
    def vocabulary_size(self) -> int:
        return self.codec.vocabulary_size

    @torch.no_grad()
    def signal(self, batch: Mapping[str, Tensor], request: SignalRequest = DISTRIBUTION) -> TeacherSignal:
        """From the batch's `columns`, each [batch, tokens, width]. Raises ValueError for all but distributions.

        Raises UserError where a batch before held what no distribution is: rows of others may.
        """
        if request.hidden_states or request.attention:
            raise ValueError("a captured teacher has neither hidden states nor attention outputs")
        self._refuse_strange()
        stored = {name: batch[name].flatten(0, 1) for name in self.columns}
        device = batch[self.columns[0]].device
        background = None if self.background is None else self.background.to(device)

        def distribution(rows: Tensor) -> Callable[[slice], Distribution]:
            def read(chunk: slice) -> Distribution:
                wanted = rows[chunk]
                decoded = self.codec.decode({name: values[wanted] for name, values in stored.items()})
                strange = self._are_strange(decoded)
                self._strange = strange if self._strange is None else self._strange | strange
                ids = decoded.ids.clamp(0, self.vocabulary_size - 1)
                return replace(decoded, ids=ids, background=background)

            return read

        return TeacherSignal(distribution)

    def check_rows(self, rows: Dataset, key: str) -> None:
        """Raises UserError where rows do not decode: another width, ids outside the vocabulary, no numbers.

        Rows from all over the dataset are looked at; all others are when they are read.
        """
        read = TensorRows(rows, self.columns)
        for row in np.unique(np.linspace(0, len(rows) - 1, ROWS_CHECKED, dtype=np.int64)).tolist():
            batch = collate([read[row]], pad_token_id=0, signal_columns=self.columns)
            try:
                decoded = self.codec.decode({name: batch[name].flatten(0, 1) for name in self.columns})
            except UserError as error:
                raise UserError(key, str(error)) from None
            if bool(self._are_strange(decoded)):
                raise UserError(
                    key,
                    f"decoded as {self.codec.kind}, row {row} holds token {int(decoded.ids.max())} of a vocabulary of "
                    f"{self.vocabulary_size}, or values that are no numbers; give the configuration that the dataset "
                    "was captured with",
                )

    def _are_strange(self, decoded: SparseDistribution) -> Bool[Tensor, ""]:
        """Whether an id is outside the vocabulary, or a log-probability is NaN or infinite."""
        outside = (decoded.ids < 0) | (decoded.ids >= self.vocabulary_size)
        return (outside | ~(decoded.logprobs < torch.inf)).any()

    def _refuse_strange(self) -> None:
        """On a GPU what is known of the batches before may be late: nothing waits for it."""
        if self._strange is None:
            return
        if self._strange.device.type == "cuda" and not self._seen.is_pinned():
            self._seen = self._seen.pin_memory()
        self._seen.copy_(self._strange, non_blocking=True)
        if bool(self._seen):
            raise UserError(
                "dataset.train_dataset",
                f"a row that was read holds a token outside the vocabulary of {self.vocabulary_size}, or values that "
                "are no numbers; it is damaged, or was not captured as the configuration says",
            )
