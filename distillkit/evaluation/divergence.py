"""How far a student is from its teacher on held-out text.

Logits of both exist for a chunk of tokens at a time, so neither the length of the sequences nor the size of the
vocabulary matters. Which tokens are measured is what training would count: every token of a document but its first.

Of a captured teacher only what was stored is known. The divergence from it is over the stored tokens and one column
for all others together, which is never more than the divergence from the whole; the teacher's perplexity is not known.
"""

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from distillkit.config import UserError
from distillkit.distribution import DenseDistribution, Distribution, at_least_float32
from distillkit.losses.divergences import kl
from distillkit.losses.objective import counted_rows, shifted_labels
from distillkit.teacher.captured import CapturedTeacher
from distillkit.teacher.decoder import decode, head
from distillkit.teacher.online import OnlineTeacher
from distillkit.teacher.signal import Teacher

CHUNK_BYTES = 256 * 2**20
LIVE_COPIES = 8
"""Float32 copies of a chunk's logits that are alive at once: two models' logits, log-probabilities, and products."""


@dataclass(frozen=True)
class Divergence:
    """Averages over `tokens` predicted tokens, at temperature 1; None where the teacher's word on them is not known."""

    kl: float | None
    """KL(teacher ‖ student), nats per token."""
    agreement: float | None
    """Share of tokens where both models' likeliest next token is the same."""
    teacher_perplexity: float | None
    student_perplexity: float
    tokens: int

    def as_metrics(self) -> dict[str, float]:
        """The numbers that are known, by name, for trackers."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@torch.no_grad()
def measure_divergence(
    teacher: PreTrainedModel | CapturedTeacher | None,
    student: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    num_tokens: int,
    vocabulary_size: int | None = None,
    student_autocast: torch.dtype | None = None,
    chunk_tokens: int | None = None,
) -> Divergence:
    """Measure the student against the teacher on the first `num_tokens` counted tokens of `batches`.

    Args:
        teacher: a causal language model on the student's device, in whatever dtype it is; a captured one, whose
            columns the batches have; or None, then the student's perplexity is all that is measured.
        student: a causal language model, in whatever dtype it is.
        batches: with `input_ids`, `position_ids` (starting again at each document) and `labels` (-100: not counted,
            among them each document's first token), each [batch, tokens].
        vocabulary_size: columns that both models' heads are cut to, where they are padded differently.
        student_autocast: dtype of the student's matrix products, where its parameters are float32 masters.
        chunk_tokens: tokens whose logits exist at once; by default as many as fit in 256 MiB.

    Raises:
        UserError: no token counts.
    """
    training = student.training
    student.eval()
    asked = OnlineTeacher(teacher) if isinstance(teacher, PreTrainedModel) else teacher
    totals: dict[str, float] = {}
    tokens = 0
    for batch in batches:
        rows = counted_rows(batch["labels"])[: num_tokens - tokens]
        sums = _batch_totals(asked, student, batch, rows, vocabulary_size, student_autocast, chunk_tokens)
        totals = {name: totals.get(name, 0.0) + total for name, total in sums.items()}
        tokens += len(rows)
        if tokens >= num_tokens:
            break
    student.train(training)
    if tokens == 0:
        raise UserError("no token to measure on: the held-out text is empty, or every document in it has one token")
    means = {name: total / tokens for name, total in totals.items()}
    return Divergence(
        kl=means.get("kl"),
        agreement=means.get("agreement"),
        teacher_perplexity=_perplexity(means["teacher_nll"]) if "teacher_nll" in means else None,
        student_perplexity=_perplexity(means["student_nll"]),
        tokens=tokens,
    )


def _batch_totals(
    teacher: Teacher | None,
    student: PreTrainedModel,
    batch: Mapping[str, Tensor],
    rows: Tensor,
    vocabulary_size: int | None,
    student_autocast: torch.dtype | None,
    chunk_tokens: int | None,
) -> dict[str, float]:
    """Sums over the given rows of the flattened batch, by name; those of the teacher where there is one."""
    device = next(student.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    rows = rows.to(device)
    targets = shifted_labels(batch["labels"]).flatten()[rows]
    said = None if teacher is None else teacher.signal(batch).distribution(rows)
    cast = _autocast(device, student_autocast)
    with cast:
        hidden = decode(student, batch["input_ids"], batch["position_ids"])[0].flatten(0, 1)[rows]
    weight, bias = head(student)
    step = chunk_tokens or max(1, CHUNK_BYTES // (4 * LIVE_COPIES * len(weight)))
    totals: dict[str, float] = {}
    for start in range(0, len(rows), step):
        chunk = slice(start, min(start + step, len(rows)))
        with cast:
            logits = at_least_float32(F.linear(hidden[chunk], weight, bias)[:, :vocabulary_size])
        word = None if said is None else said(chunk)
        if word is not None and vocabulary_size is not None:
            word = word.first_columns(vocabulary_size)
        for name, total in _chunk_totals(word, logits, targets[chunk]).items():
            totals[name] = totals.get(name, 0.0) + total.double().item()
    return totals


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
    return {**totals, "kl": per_token.sum(), "agreement": (likeliest == logits.argmax(-1)).sum()}


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    if dtype is None or dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def _perplexity(nll: float) -> float:
    """exp of the mean negative log-likelihood; infinity where that overflows."""
    return math.inf if nll >= 700 else math.exp(nll)
