"""A student's and its teacher's distributions over the same tokens, a chunk of tokens at a time.

Logits of both exist for one chunk only, so memory does not depend on the length of the sequences. The tokens are those
that training would count: every token of a document but its first. Every measure of divergence is computed from these
chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from distillkit.distribution import Distribution, at_least_float32
from distillkit.models.chunked_logits import ChunkedHead, chunk_tokens_within
from distillkit.models.decoder import decode, head
from distillkit.models.labels import counted_rows
from distillkit.teacher import SignalRequest, Teacher

CHUNK_BYTES = 256 * 2**20
"""Memory for the logits of a chunk and what is computed from them."""


@dataclass(frozen=True)
class Chunk:
    """The distributions of both models at some tokens."""

    teacher: Distribution | None
    logits: Float[Tensor, "tokens vocab"]
    """The student's, in float32 or float64."""
    targets: Int[Tensor, " tokens"]


@dataclass(frozen=True)
class ModelPair:
    """A student and its teacher; without a teacher only the student is measured.

    vocabulary_size: columns to which both models' logits are cut, where the heads are padded differently.
    student_autocast: dtype of the student's matrix products, where its parameters are float32 masters.
    chunk_tokens: tokens whose logits exist at once; by default as many as fit in 256 MiB.
    layers: indices of the hidden states that are compared, the last one before the final norm.
    """

    teacher: Teacher | None
    student: PreTrainedModel
    vocabulary_size: int | None = None
    student_autocast: torch.dtype | None = None
    chunk_tokens: int | None = None
    layers: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        """Device of the batches."""
        return next(self.student.parameters()).device

    def outputs(self, batch: Mapping[str, Tensor], rows: Int[Tensor, " rows"]) -> PairOutputs:
        """Outputs of both models at `rows` of the flattened batch, which is on `device`."""
        signal = None
        if self.teacher is not None:
            signal = self.teacher.signal(batch, SignalRequest(hidden_states=self.layers, final_norm=False))
        with self._autocast():
            hidden, states = decode(
                self.student, batch["input_ids"], batch["position_ids"], self.layers, final_norm=False
            )
        pairs = ((states[layer], signal.hidden_states[layer]) for layer in self.layers if signal is not None)
        return PairOutputs(
            self._chunks(
                hidden.flatten(0, 1)[rows],
                batch["targets"].flatten()[rows],
                None if signal is None else signal.distribution(rows),
            ),
            ((student.flatten(0, 1)[rows], teacher.flatten(0, 1)[rows]) for student, teacher in pairs),
        )

    def _chunks(
        self, hidden: Tensor, targets: Tensor, teacher: Callable[[slice], Distribution] | None
    ) -> Iterator[Chunk]:
        weight, bias = head(self.student)
        students = ChunkedHead(weight, bias, self.student_autocast or weight.dtype)
        step = self.chunk_tokens or chunk_tokens_within(CHUNK_BYTES, len(weight))
        for start in range(0, len(hidden), step):
            chunk = slice(start, min(start + step, len(hidden)))
            logits = at_least_float32(students.logits(hidden[chunk])[:, : self.vocabulary_size])
            distribution = None if teacher is None else teacher(chunk)
            if distribution is not None and self.vocabulary_size is not None:
                distribution = distribution.first_columns(self.vocabulary_size)
            yield Chunk(distribution, logits, targets[chunk])

    def _autocast(self) -> AbstractContextManager[object]:
        if self.student_autocast in (None, torch.float32):
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.student_autocast)


@dataclass(frozen=True)
class PairOutputs:
    """Chunks of the distributions at some rows of a batch, and for each layer both models' hidden states there.

    Both are computed while they are iterated over.
    """

    chunks: Iterator[Chunk]
    hidden_states: Iterator[tuple[Float[Tensor, "rows width"], Float[Tensor, "rows width"]]]


def counted_batches(
    batches: Iterable[Mapping[str, Tensor]], num_tokens: int, device: torch.device
) -> Iterator[tuple[dict[str, Tensor], Int[Tensor, " rows"]]]:
    """Batches on the device with the indices of their counted rows, until there are `num_tokens` of these."""
    left = num_tokens
    for batch in batches:
        rows = counted_rows(batch["targets"])[:left]
        yield {name: tensor.to(device) for name, tensor in batch.items()}, rows.to(device)
        left -= len(rows)
        if left <= 0:
            return
