"""The divergence of a student from its teacher on held-out text, as a run measures it: cheap, and for any teacher.

`distillkit evaluate` measures more (`evaluation.comparison`), from the same chunks.

A captured teacher has only its stored tokens. Its divergence is computed over these and one column for all other tokens
together, and is never more than that from the whole distribution. Its perplexity is unknown.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from distillkit.config import UserError
from distillkit.distribution import DenseDistribution, Distribution, at_least_float32
from distillkit.evaluation.chunks import ModelPair, counted_batches
from distillkit.formatting import number_text
from distillkit.losses.divergences import kl
from distillkit.models.divided_rows import Context
from distillkit.models.labels import IGNORED_LABEL, counted_rows
from distillkit.reporting.comparison import KL, STORED_KL
from distillkit.teacher import Teacher

NOTHING_TO_MEASURE = "the held-out text has no token to measure: it is empty, or every document in it has one token"


@dataclass(frozen=True)
class Divergence:
    """Means over `tokens` predicted tokens, at temperature 1; None where the teacher's distribution is unknown."""

    kl: float | None
    """KL(teacher ‖ student), nats per token."""
    agreement: float | None
    """Share of tokens where both models' likeliest next token is the same."""
    teacher_perplexity: float | None
    student_perplexity: float | None
    tokens: int
    stored_only: bool = False
    """Whether kl is over the teacher's stored tokens and one column for all others: at most that of both models."""

    def as_metrics(self) -> dict[str, float]:
        """The known numbers by name, for trackers."""
        numbers = {name: value for name, value in asdict(self).items() if name != "stored_only"}
        return {name: value for name, value in numbers.items() if value is not None}


@torch.no_grad()
def measure_divergence(
    teacher: Teacher | None,
    student: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    num_tokens: int,
    vocabulary_size: int | None = None,
    student_autocast: torch.dtype | None = None,
    chunk_tokens: int | None = None,
    context: Context | None = None,
) -> Divergence:
    """Measure the student against the teacher on the first `num_tokens` counted tokens of `batches`.

    Args:
        teacher: for a captured one, batches have its columns; None: only the student's perplexity is measured.
        student: a causal language model of any dtype.
        batches: with `input_ids`, `position_ids` (starting again at each document) and `targets` (-100: not counted,
            among them each document's last token), each [batch, tokens].
        vocabulary_size: columns to which both models' logits are cut, where the heads are padded differently.
        student_autocast: dtype of the student's matrix products, where its parameters are float32 masters.
        chunk_tokens: tokens whose logits exist at once; by default as many as fit in 256 MiB.
        context: processes that share the rows, of which each is given whole batches.

    Raises:
        UserError: no token counts.
    """
    training = student.training
    student.eval()
    pair = ModelPair(teacher, student, vocabulary_size, student_autocast, chunk_tokens)
    totals: dict[str, float] = {}
    tokens = 0
    for batch, rows in counted_batches(batches, num_tokens, pair.device):
        tokens += len(rows)
        if context is not None:
            batch, rows = _part(context, batch, rows)
        for chunk in pair.outputs(batch, rows).chunks:
            for name, total in _chunk_totals(chunk.teacher, chunk.logits, chunk.targets).items():
                totals[name] = totals.get(name, 0.0) + total.double().item()
    student.train(training)
    if context is not None:
        totals = context.sums(totals)
    if tokens == 0:
        raise UserError(None, NOTHING_TO_MEASURE)
    means = {name: total / tokens for name, total in totals.items()}
    return Divergence(
        kl=means.get("kl"),
        agreement=means.get("agreement"),
        teacher_perplexity=_perplexity(means["teacher_nll"]) if "teacher_nll" in means else None,
        student_perplexity=_perplexity(means["student_nll"]),
        tokens=tokens,
        stored_only="kl" in means and "teacher_nll" not in means,
    )


def _part(
    context: Context, batch: Mapping[str, Tensor], rows: Int[Tensor, " rows"]
) -> tuple[dict[str, Tensor], Int[Tensor, " rows"]]:
    """This process's part of a batch, and where in it those counted rows are that it has."""
    targets = batch["targets"]
    counted = torch.full_like(targets.flatten(), IGNORED_LABEL).index_copy(0, rows, targets.flatten()[rows])
    part = context.part_of({**batch, "targets": counted.view(targets.shape)})
    return part, counted_rows(part["targets"])


def _chunk_totals(
    teacher: Distribution | None, logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]
) -> dict[str, Tensor]:
    totals = {"student_nll": F.cross_entropy(logits, targets, reduction="sum")}
    if teacher is None:
        return totals
    per_token, _ = kl(logits, teacher, targets, missing_probability_handling="symmetric_uniform")
    if isinstance(teacher, DenseDistribution):
        likeliest = teacher.logits.argmax(-1)
        totals["teacher_nll"] = F.cross_entropy(at_least_float32(teacher.logits), targets, reduction="sum")
    else:
        likeliest = teacher.top_k(1).ids.squeeze(-1)
    agree = (likeliest == logits.argmax(-1)).to(per_token.dtype)
    # For NaN logits argmax returns the same column for both models.
    return {**totals, "kl": per_token.sum(), "agreement": agree.masked_fill(per_token.isnan(), torch.nan).sum()}


def divergence_table(columns: dict[str, Divergence]) -> Table:
    """One column per measurement, under its name."""
    table = Table(title="divergence from the teacher, on held-out text", title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for label, cells in _rows(list(columns.values())):
        table.add_row(label, *cells)
    return table


def _rows(measured: Sequence[Divergence]) -> Iterator[tuple[str, list[str]]]:
    for label, stored in ((KL, False), (STORED_KL, True)):
        if any(each.stored_only == stored for each in measured):
            of_kind = [each.kl if each.stored_only == stored else None for each in measured]
            yield label, [number_text(kl, ".4f") for kl in of_kind]
    yield "same likeliest token", [number_text(each.agreement, ".1%") for each in measured]
    yield "perplexity, student", [number_text(each.student_perplexity, ".2f") for each in measured]
    yield "perplexity, teacher", [number_text(each.teacher_perplexity, ".2f") for each in measured]
    yield "tokens measured", [f"{each.tokens:,}" for each in measured]


def _perplexity(nll: float) -> float:
    """exp of the mean negative log-likelihood; infinity where that overflows."""
    return math.inf if nll >= 700 else math.exp(nll)
