"""The objective of training: the weighted mean of `loss_functions`, over one batch at a time.

All losses use one mask: targets say what each position predicts, and whether it counts. The counted rows
(positions of the flattened batch) are computed once; losses of logits, hidden states and attention outputs count only
these. Sums are divided by the count of the whole optimizer step, which the caller passes: then the gradients of the
micro-batches of a step add up to those of the undivided batch.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distillkit.config import LossConfig, UserError
from distillkit.losses.alignment import AlignedLayer, aligned_losses
from distillkit.losses.divergences import LossFunction
from distillkit.losses.from_module import load_loss
from distillkit.losses.functions import (
    ATTENTION_LOSSES,
    HIDDEN_STATE_LOSSES,
    LOSSES,
    RANKING_LOSSES,
    masked_totals,
)
from distillkit.losses.layers import ModelShape, check_attention, layer_pairs
from distillkit.losses.ranking import preference_pair_counts
from distillkit.losses.vocabulary_head import (
    LossTerm,
    TeacherChunks,
    TermTotals,
    chunked_vocabulary_losses,
    term_totals,
)
from distillkit.models.chunked_logits import chunk_tokens_within
from distillkit.models.labels import IGNORED_LABEL, counted_rows

# Memory for a chunk's logits and all intermediate results of the losses. (Not less on a CPU: glibc returns freed memory
# to the system only for blocks above 32 MiB, so that many smaller ones fragment it.)
CUDA_CHUNK_BYTES = 4 * 2**30
CPU_CHUNK_BYTES = 512 * 2**20

DistributionOfRows = Callable[[Int[Tensor, " rows"]], TeacherChunks]
"""From indices into the flattened batch [batch · tokens] to the teacher distributions of slices of these rows."""


@dataclass(frozen=True)
class ObjectiveResult:
    """`loss` to differentiate; per loss its sum over this batch and its count (tokens, or preference pairs)."""

    loss: Float[Tensor, ""]
    sums: dict[str, Float[Tensor, ""]]
    counts: dict[str, Float[Tensor, ""]]


class Objective(nn.Module):
    """The losses, and the learned projections of hidden-state losses (its only parameters).

    `student` and `teacher` are needed only for losses of hidden states and of attention outputs. A projection (student
    width → teacher width, per pair of hidden states) is learned where the widths differ, or everywhere with
    `force_hidden_state_projection`. `vocabulary_size` is the common vocabulary of models whose embeddings are padded
    differently. `chunk_tokens` replaces the losses' `sparse_chunk_length`; without both, a memory budget decides.
    `attention_layers` are the layers, counted from 0, whose attention outputs a loss may compare.
    Raises UserError for a layer mapping that does not exist in the two models, for attention outputs that cannot be
    compared, and for a loss from a module that cannot be imported or called.
    """

    def __init__(
        self,
        loss_functions: Sequence[LossConfig],
        layer_mapping: Literal["all"] | Sequence[tuple[int, int]] | None = None,
        student: ModelShape | None = None,
        teacher: ModelShape | None = None,
        *,
        force_hidden_state_projection: bool = False,
        vocabulary_size: int | None = None,
        chunk_tokens: int | None = None,
        attention_layers: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.vocabulary_size = vocabulary_size
        self._compiled_totals: TermTotals | None = None
        self._compiled_pair_sum: Callable[..., Tensor] | None = None
        hints = [loss.sparse_chunk_length for loss in loss_functions if loss.sparse_chunk_length is not None]
        self.chunk_tokens = chunk_tokens or min(hints, default=None)
        terms = list(zip(loss_functions, _terms(loss_functions), strict=True))
        self.hidden_terms = [term for loss, term in terms if loss.function in HIDDEN_STATE_LOSSES]
        self.attention_terms = [term for loss, term in terms if loss.function in ATTENTION_LOSSES]
        self.ranking_terms = [term for loss, term in terms if loss.function in RANKING_LOSSES]
        self.terms = [term for loss, term in terms if loss.function not in HIDDEN_STATE_LOSSES | ATTENTION_LOSSES]
        self.needs_teacher = any(loss.function != "cross_entropy" for loss in loss_functions)
        self.taps_final_norm = layer_mapping != "all"

        self.pairs: list[tuple[int, int]] = []
        self.projections = nn.ModuleList()
        if self.hidden_terms:
            if layer_mapping is None or student is None or teacher is None:
                raise UserError("layer_mapping", "is missing; hidden-state losses need all, or pairs")
            self.pairs = layer_pairs(layer_mapping, student.num_layers, teacher.num_layers)
            if force_hidden_state_projection or student.hidden_size != teacher.hidden_size:
                self.projections.extend(
                    nn.Linear(student.hidden_size, teacher.hidden_size, bias=False) for _ in self.pairs
                )
        self.attention_layers: list[int] = []
        if self.attention_terms:
            check_attention(loss_functions, attention_layers, student, teacher)
            self.attention_layers = sorted(attention_layers)
        self.student_layers = sorted({student_layer for student_layer, _ in self.pairs})
        self.teacher_layers = sorted({teacher_layer for _, teacher_layer in self.pairs})

    @contextmanager
    def compiled(self, backend: str, mode: str | None) -> Iterator[None]:
        """Within this context, losses of logits and of hidden states are compiled, which saves passes over memory."""
        self._compiled_totals = torch.compile(term_totals, backend=backend, mode=mode)
        self._compiled_pair_sum = torch.compile(pair_sum, backend=backend, mode=mode)
        try:
            yield
        finally:
            self._compiled_totals, self._compiled_pair_sum = None, None

    @property
    def needs_hidden_states(self) -> bool:
        """Whether a loss uses outputs of the student's decoder, and not only of its attention."""
        return bool(self.terms or self.hidden_terms)

    def preference_pairs(
        self, targets: Int[Tensor, "batch tokens"], teacher_distribution: DistributionOfRows, chunk_tokens: int = 1024
    ) -> dict[str, Float[Tensor, ""]]:
        """The preference pairs of this batch, per ranking loss; summed over a step's batches, `forward` takes them."""
        rows = counted_rows(targets)
        totals = {term.name: torch.zeros((), device=targets.device) for term in self.ranking_terms}
        if totals:
            chunks = teacher_distribution(rows)
            for start in range(0, len(rows), chunk_tokens):
                distribution = chunks(slice(start, min(start + chunk_tokens, len(rows))))
                if self.vocabulary_size is not None:
                    distribution = distribution.first_columns(self.vocabulary_size)
                for term in self.ranking_terms:
                    totals[term.name] += preference_pair_counts(distribution, term.options.get("top_k")).sum()
        return totals

    def forward(
        self,
        final_hidden_states: Float[Tensor, "batch tokens width"] | None,
        head_weight: Float[Tensor, "vocab width"],
        head_bias: Float[Tensor, " vocab"] | None,
        targets: Int[Tensor, "batch tokens"],
        teacher_distribution: DistributionOfRows | None,
        student_hidden_states: Mapping[int, Float[Tensor, "batch tokens width"]],
        teacher_hidden_states: Mapping[int, Float[Tensor, "batch tokens teacher_width"]],
        normalizer: float | Tensor,
        preference_pairs: Mapping[str, float | Tensor] | None = None,
        aligned_layers: Sequence[AlignedLayer] = (),
    ) -> ObjectiveResult:
        """The loss of one (micro-)batch: Σ over losses of weight · sum / count of the whole optimizer step.

        `targets`: what each position predicts; -100 where the loss must not count. `teacher_distribution(rows)` gives
        the teacher distributions of rows of the flattened batch. `normalizer`: the counted tokens of the step.
        Ranking losses are divided by `preference_pairs`, the number of pairs, instead (ValueError without it).
        `aligned_layers` are those of `attention_layers`. Losses of attention outputs need no other states.
        """
        if self.ranking_terms and preference_pairs is None:
            raise ValueError("ranking losses need preference_pairs, the pairs in the whole optimizer step")
        counted = targets.flatten() != IGNORED_LABEL
        rows = counted.nonzero().squeeze(-1)
        loss = torch.zeros((), device=targets.device)
        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        if self.terms:
            assert final_hidden_states is not None
            normalizers = {term.name: normalizer for term in self.terms} | dict(preference_pairs or {})
            loss, sums, counts = chunked_vocabulary_losses(
                final_hidden_states.flatten(0, 1).index_select(0, rows),
                head_weight,
                head_bias,
                targets.flatten()[rows],
                teacher_distribution(rows) if teacher_distribution is not None else None,
                self.terms,
                normalizers,
                self.chunk_tokens or _affordable_chunk(head_weight),
                self.vocabulary_size,
                self._compiled_totals,
            )
        for term in self.hidden_terms:
            sums[term.name] = self._hidden_sum(term.function, counted, student_hidden_states, teacher_hidden_states)
            counts[term.name] = torch.full_like(sums[term.name], len(rows))
            loss = loss + term.weight * sums[term.name] / torch.as_tensor(normalizer).clamp(min=1)
        if self.attention_terms:
            part, totals = aligned_losses(aligned_layers, counted, self.attention_terms, normalizer)
            loss, sums = loss + part, sums | totals
            counts |= {name: torch.full_like(total, len(rows)) for name, total in totals.items()}
        return ObjectiveResult(loss, {name: value.detach() for name, value in sums.items()}, counts)

    def _hidden_sum(
        self,
        function: LossFunction,
        counted: Bool[Tensor, " batch_tokens"],
        student_states: Mapping[int, Tensor],
        teacher_states: Mapping[int, Tensor],
    ) -> Float[Tensor, ""]:
        """Σ over counted positions of one hidden-state loss, averaged over the pairs of layers.

        Each pair's float32 intermediate results are computed again in the backward pass: those of 36 layers at 32k
        tokens would take more memory than the model. Compiled and without a projection, the loss keeps none.
        """
        kept = self._compiled_pair_sum is not None and not self.projections
        sum_of: Callable[..., Tensor] = self._compiled_pair_sum or pair_sum
        if not kept:
            sum_of = functools.partial(checkpoint, sum_of, use_reentrant=False, preserve_rng_state=False)
        projections = self.projections or [None] * len(self.pairs)
        per_pair = [
            sum_of(function, counted, student_states[student_layer], teacher_states[teacher_layer], projection)
            for (student_layer, teacher_layer), projection in zip(self.pairs, projections, strict=True)
        ]
        return torch.stack(per_pair).mean()


def pair_sum(
    function: LossFunction,
    counted: Bool[Tensor, " batch_tokens"],
    student: Float[Tensor, "batch tokens width"],
    teacher: Float[Tensor, "batch tokens teacher_width"],
    projection: nn.Linear | None,
) -> Float[Tensor, ""]:
    """Σ over the counted positions of one hidden-state loss, for one pair of layers.

    It is computed at all positions: where documents are packed nearly all count, and gathering these takes longer.
    """
    student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    if projection is not None:
        student = projection(student.to(projection.weight.dtype))
    total, _ = masked_totals(*function(student, teacher), counted)
    return total


def _terms(loss_functions: Sequence[LossConfig]) -> list[LossTerm]:
    """Weights divided by their sum; a loss that is repeated is named kl_2, kl_3, …"""
    total = sum(loss.weight for loss in loss_functions)
    seen: Counter[str] = Counter()
    terms = []
    for position, loss in enumerate(loss_functions):
        seen[loss.name] += 1
        name = loss.name if seen[loss.name] == 1 else f"{loss.name}_{seen[loss.name]}"
        function = load_loss(loss, position) if loss.is_from_module else LOSSES[loss.function]
        keys = {"temperature", "missing_probability_handling", "margin", "top_k"}
        options = loss.model_dump(include=keys, exclude_none=True) | (loss.options or {})
        terms.append(LossTerm(name, function, loss.weight / total, options))
    return terms


def _affordable_chunk(head_weight: Tensor) -> int:
    memory_bytes = CUDA_CHUNK_BYTES if head_weight.is_cuda else CPU_CHUNK_BYTES
    return chunk_tokens_within(memory_bytes, len(head_weight))
