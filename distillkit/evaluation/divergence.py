"""How far a student is from its teacher on held-out text.

Logits of both exist for a chunk of tokens at a time, so neither the length of the sequences nor the size of the
vocabulary matters. Which tokens are measured is what training would count: every token of a document but its first.
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
from distillkit.distribution import at_least_float32
from distillkit.losses.objective import counted_rows, shifted_labels
from distillkit.teacher.decoder import decode, head

CHUNK_BYTES = 256 * 2**20
LIVE_COPIES = 8
"""Float32 copies of a chunk's logits that are alive at once: two models' logits, log-probabilities, and products."""


@dataclass(frozen=True)
class Divergence:
    """Averages over `tokens` predicted tokens, at temperature 1."""

    kl: float
    """KL(teacher ‖ student), nats per token."""
    agreement: float
    """Share of tokens where both models' likeliest next token is the same."""
    teacher_perplexity: float
    student_perplexity: float
    tokens: int

    def as_metrics(self) -> dict[str, float]:
        """Plain numbers by name, for results and trackers."""
        return asdict(self)


@torch.no_grad()
def measure_divergence(
    teacher: PreTrainedModel,
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
        teacher, student: causal language models on one device, in whatever dtype they are.
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
    teacher.eval()
    totals = torch.zeros(4, dtype=torch.float64)
    tokens = 0
    for batch in batches:
        rows = counted_rows(batch["labels"])[: num_tokens - tokens]
        totals += _batch_totals(teacher, student, batch, rows, vocabulary_size, student_autocast, chunk_tokens).cpu()
        tokens += len(rows)
        if tokens >= num_tokens:
            break
    student.train(training)
    if tokens == 0:
        raise UserError("no token to measure on: the held-out text is empty, or every document in it has one token")
    kl, agreement, teacher_nll, student_nll = (totals / tokens).tolist()
    return Divergence(kl, agreement, _perplexity(teacher_nll), _perplexity(student_nll), tokens)


def _batch_totals(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    batch: Mapping[str, Tensor],
    rows: Tensor,
    vocabulary_size: int | None,
    student_autocast: torch.dtype | None,
    chunk_tokens: int | None,
) -> Float[Tensor, "4"]:
    """Sums of KL, agreement and both models' negative log-likelihoods over the given rows of the flattened batch."""
    device = next(teacher.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    rows = rows.to(device)
    targets = shifted_labels(batch["labels"]).flatten()[rows]
    cast = _autocast(device, student_autocast)
    teacher_hidden = decode(teacher, batch["input_ids"], batch["position_ids"])[0].flatten(0, 1)[rows]
    with cast:
        student_hidden = decode(student, batch["input_ids"], batch["position_ids"])[0].flatten(0, 1)[rows]
    width = head(teacher)[0].shape[0]
    step = chunk_tokens or max(1, CHUNK_BYTES // (4 * LIVE_COPIES * width))
    totals = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(rows), step):
        chunk = slice(start, start + step)
        teacher_logprobs = _logprobs(teacher, teacher_hidden[chunk], vocabulary_size)
        with cast:
            student_logprobs = _logprobs(student, student_hidden[chunk], vocabulary_size)
        totals += _chunk_totals(teacher_logprobs, student_logprobs, targets[chunk]).cpu()
    return totals


def _chunk_totals(
    teacher: Float[Tensor, "tokens vocab"], student: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, "4"]:
    agreement = (teacher.argmax(-1) == student.argmax(-1)).sum()
    teacher_nll = F.nll_loss(teacher, targets, reduction="sum")
    student_nll = F.nll_loss(student, targets, reduction="sum")
    kl = (teacher.exp() * (teacher - student)).sum()
    return torch.stack([kl.double(), agreement.double(), teacher_nll.double(), student_nll.double()])


def _logprobs(
    model: PreTrainedModel, hidden: Float[Tensor, "tokens width"], vocabulary_size: int | None
) -> Float[Tensor, "tokens vocab"]:
    weight, bias = head(model)
    logits = F.linear(hidden, weight, bias)[:, :vocabulary_size]
    return at_least_float32(logits).log_softmax(-1)


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    if dtype is None or dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def _perplexity(nll: float) -> float:
    """exp of the mean negative log-likelihood; infinity where that overflows."""
    return math.inf if nll >= 700 else math.exp(nll)
