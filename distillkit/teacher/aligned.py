"""A teacher with another tokenizer: it reads the same text, and is compared where tokens of both are the same.

Where the next token is the same bytes for both models, behind the same text, the teacher's distribution is taken over
the tokens that both vocabularies have (as GOLD does, Hugging Face 2025); the rest of its probability is missing, as
with any sparse teacher. All other positions count nowhere.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distillkit.config.errors import UserError
from distillkit.data.collate import collate
from distillkit.distribution import DenseDistribution, Distribution, SparseDistribution, at_least_float32
from distillkit.models.labels import IGNORED_LABEL
from distillkit.models.token_alignment import KEY, TokenAlignment
from distillkit.teacher.live import LiveTeacher
from distillkit.teacher.teacher import DISTRIBUTION, OverProcesses, SignalRequest, Teacher, TeacherSignal

logger = logging.getLogger(__name__)

ROWS_CHECKED = 64
"""Number of rows whose alignment is looked at before a run starts."""
IDS, POSITIONS, PLACES = "teacher_input_ids", "teacher_position_ids", "teacher_places"


class AlignedTeacher(Teacher):
    """A live teacher that reads the text of the student's tokens by its own tokenizer.

    Args:
        model: the teacher.
        student, own: the two tokenizers.
        top_k: of the tokens that both have, how many of the likeliest a distribution holds.
    """

    model: PreTrainedModel

    def __init__(
        self, model: PreTrainedModel, student: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, top_k: int
    ) -> None:
        self.model = model
        self.top_k = top_k
        self._live = LiveTeacher(model)
        self._alignment = TokenAlignment(student, own)
        self._embedded = model.get_input_embeddings().weight.shape[0]
        self._columns = max(student.get_vocab().values()) + 1
        ours, theirs = self._alignment.shared
        known = theirs < self._live.vocabulary_size
        self._shared = ours[known], theirs[known]

    @property
    def vocabulary_size(self) -> int:
        """Of the student's tokens: distributions are over these."""
        return self._columns

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with the teacher's tokens of its documents, and without the targets that are not the same for both.

        `teacher_places` [batch, tokens]: the teacher's position, in its row, that predicts what the student's predicts.
        """
        columns = (batch[name] for name in ("input_ids", "position_ids", "targets"))
        rows = [self._aligned_row(*each) for each in zip(*columns, strict=True)]
        width = max(len(ids) for ids, _, _ in rows)
        ids, positions = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
        for row, (row_ids, row_positions, _) in enumerate(rows):
            ids[row, : len(row_ids)] = torch.tensor(row_ids)
            positions[row, : len(row_ids)] = torch.tensor(row_positions)
        if (largest := int(ids.max())) >= self._embedded:
            problem = f"reads token {largest}, and the teacher has embeddings of the first {self._embedded:,}"
            raise UserError(KEY, f"{problem}; remove it from the text")
        places = torch.tensor([places for _, _, places in rows])
        targets = batch["targets"].masked_fill(places < 0, IGNORED_LABEL)
        return {**batch, "targets": targets, IDS: ids, POSITIONS: positions, PLACES: places}

    def _aligned_row(
        self, input_ids: Tensor, position_ids: Tensor, targets: Tensor
    ) -> tuple[list[int], list[int], list[int]]:
        """The teacher's tokens and positions of a row, and the place there that predicts what each position does."""
        ids, positions, places = [0], [0], [-1] * len(input_ids)
        starts = [*(position_ids == 0).nonzero().flatten().tolist(), len(input_ids)]
        for start, end in zip(starts, starts[1:], strict=False):
            if not (targets[start:end] != IGNORED_LABEL).any():
                continue
            pairs = self._alignment.align(input_ids[start:end].tolist())
            first = len(ids)
            for index in range(1, end - start):
                if pairs.places[index] > 0:
                    places[start + index - 1] = first + pairs.places[index] - 1
            ids += pairs.teacher_ids
            positions += range(len(pairs.teacher_ids))
        return ids, positions, places

    @torch.no_grad()
    def signal(self, batch: Mapping[str, Tensor], request: SignalRequest = DISTRIBUTION) -> TeacherSignal:
        """From a batch that `prepare` has made. Raises ValueError for attention outputs, which are of other tokens."""
        if request.attention:
            raise ValueError("a teacher with another tokenizer has no attention outputs of the student's tokens")
        read = {"input_ids": batch[IDS], "position_ids": batch[POSITIONS]}
        live = self._live.signal(read, replace(request, top_k=None, vocabulary_size=None))
        width = batch[IDS].shape[1]
        places = batch[PLACES] + width * torch.arange(len(batch[PLACES]), device=batch[PLACES].device).unsqueeze(1)
        wanted = places.where(batch[PLACES] >= 0, 0).flatten()
        columns = min(request.vocabulary_size or self._columns, self._columns)

        def distribution(rows: Tensor) -> Callable[[slice], Distribution]:
            chunks = live.distribution(wanted[rows])
            return lambda chunk: self._over_shared(chunks(chunk), columns)

        def on_students_grid(state: Tensor) -> Tensor:
            return state.flatten(0, 1)[wanted].view(*batch[PLACES].shape, -1)

        states = {index: on_students_grid(state) for index, state in live.hidden_states.items()}
        return TeacherSignal(distribution, states)

    def _over_shared(self, distribution: Distribution, columns: int) -> SparseDistribution:
        assert isinstance(distribution, DenseDistribution)
        logits = at_least_float32(distribution.logits)
        ours, theirs = (each.to(logits.device) for each in self._shared)
        ours, theirs = ours[ours < columns], theirs[ours < columns]
        values, best = logits[:, theirs].topk(min(self.top_k, len(theirs)), dim=-1)
        return SparseDistribution(ours[best], values - logits.logsumexp(-1, keepdim=True))

    def check_outputs(self, batch: Mapping[str, Tensor], over_processes: OverProcesses = lambda here: [here]) -> None:
        read = {"input_ids": batch[IDS], "position_ids": batch[POSITIONS]}
        self._live.check_outputs(read, over_processes)

    def check_rows(self, rows: Dataset, key: str) -> None:
        """Says what share of the tokens is the same for both. Raises `UserError` where none is."""
        counted = aligned = 0
        for row in np.unique(np.linspace(0, len(rows) - 1, ROWS_CHECKED, dtype=np.int64)).tolist():
            batch = collate([rows[row]], pad_token_id=0)
            counted += int((batch["targets"] != IGNORED_LABEL).sum())
            aligned += int((self.prepare(batch)["targets"] != IGNORED_LABEL).sum())
        if counted and not aligned:
            raise UserError(KEY, f"no token of {key} is the same for teacher and student")
        line = "%s: %.1f%% of the tokens that count are one token for both models; the others are not compared"
        logger.warning(line, key, 100 * aligned / max(counted, 1))
