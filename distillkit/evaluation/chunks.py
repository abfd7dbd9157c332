"""What two models say about the same tokens, a chunk of tokens at a time.

Logits of both exist for one chunk, so neither the length of the sequences nor the size of the vocabulary matters. Which
tokens are measured is what training would count: every token of a document but its first. Every measure of divergence
reads its numbers off these chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from distillkit.distribution import Distribution, at_least_float32
from distillkit.losses.objective import counted_rows, shifted_labels
from distillkit.losses.vocabulary_head import padded
from distillkit.models.decoder import decode, head
from distillkit.teacher.signal import Teacher

CHUNK_BYTES = 256 * 2**20
LIVE_COPIES = 9
"""Float32 copies of a chunk's logits that are alive at once: two models' logits, log-probabilities, and products."""


@dataclass(frozen=True)
class Chunk:
    """Some tokens, and what both models say of them."""

    teacher: Distribution | None
    logits: Float[Tensor, "tokens vocab"]
    """The student's, in float32 or float64."""
    targets: Int[Tensor, " tokens"]


@dataclass(frozen=True)
class Pair:
    """A student and the teacher that is asked about the same batches; None where the student alone is.

    vocabulary_size: columns that both models' heads are cut to, where they are padded differently.
    student_autocast: dtype of the student's matrix products, where its parameters are float32 masters.
    chunk_tokens: tokens whose logits exist at once; by default as many as fit in 256 MiB.
    layers: indices of the hidden states that are kept of a batch, the last one before the final norm. The teacher is
        expected to give the same ones.
    """

    teacher: Teacher | None
    student: PreTrainedModel
    vocabulary_size: int | None = None
    student_autocast: torch.dtype | None = None
    chunk_tokens: int | None = None
    layers: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where batches are read."""
        return next(self.student.parameters()).device

    def answers(self, batch: Mapping[str, Tensor], rows: Int[Tensor, " rows"]) -> Answers:
        """Both models' word on the given rows of the flattened batch, which is on `device`."""
        signal = None if self.teacher is None else self.teacher.signal(batch)
        with self._autocast():
            hidden, states = decode(
                self.student, batch["input_ids"], batch["position_ids"], self.layers, final_norm=False
            )
        pairs = ((states[layer], signal.hidden_states[layer]) for layer in self.layers if signal is not None)
        return Answers(
            self._chunks(
                hidden.flatten(0, 1)[rows],
                shifted_labels(batch["labels"]).flatten()[rows],
                None if signal is None else signal.distribution(rows),
            ),
            ((student.flatten(0, 1)[rows], teacher.flatten(0, 1)[rows]) for student, teacher in pairs),
        )

    def _chunks(self, hidden: Tensor, targets: Tensor, said: Callable[[slice], Distribution] | None) -> Iterator[Chunk]:
        weight, bias = head(self.student)
        matrix = padded(weight.detach().to(self.student_autocast or weight.dtype), dim=0)
        columns = min(len(weight), self.vocabulary_size or len(weight))
        step = self.chunk_tokens or max(1, CHUNK_BYTES // (4 * LIVE_COPIES * len(weight)))
        for start in range(0, len(hidden), step):
            chunk = slice(start, min(start + step, len(hidden)))
            logits = F.linear(hidden[chunk].to(matrix.dtype), matrix)[:, : len(weight)]
            if bias is not None:
                logits = logits + bias
            word = None if said is None else said(chunk)
            if word is not None and self.vocabulary_size is not None:
                word = word.first_columns(self.vocabulary_size)
            yield Chunk(word, at_least_float32(logits[:, :columns]), targets[chunk])

    def _autocast(self) -> AbstractContextManager[object]:
        if self.student_autocast in (None, torch.float32):
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.student_autocast)


@dataclass(frozen=True)
class Answers:
    """Of one batch: the chunks of its rows, and for each layer the student's and the teacher's hidden states there.

    Both are made as they are read.
    """

    chunks: Iterator[Chunk]
    hidden_states: Iterator[tuple[Float[Tensor, "rows width"], Float[Tensor, "rows width"]]]


def counted_batches(
    batches: Iterable[Mapping[str, Tensor]], num_tokens: int, device: torch.device
) -> Iterator[tuple[dict[str, Tensor], Int[Tensor, " rows"]]]:
    """Batches on the device, and the rows of each that count, until there are `num_tokens` of these."""
    left = num_tokens
    for batch in batches:
        rows = counted_rows(batch["labels"])[:left]
        yield {name: tensor.to(device) for name, tensor in batch.items()}, rows.to(device)
        left -= len(rows)
        if left <= 0:
            return
