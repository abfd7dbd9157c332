"""The suite `divergence`: a student compared with its teacher on held-out text, token by token.

Both predict the same tokens, at temperature 1. A few numbers per token are kept until the end of its batch, and their
sums per document; so memory is that of a batch, and does not grow with tokens × vocabulary.

kl, reverse_kl, jsd      KL(p ‖ q), KL(q ‖ p) and Jensen-Shannon divergence as `losses` defines them, p the teacher;
                         nats per token
agreement                share of tokens at which both models' likeliest next token is the same
agreement_top5           share at which the teacher's likeliest token is among the student's five likeliest
teacher_, student_perplexity   exp of the mean negative log-likelihood of the real next token
teacher_, student_ece    expected calibration error: of the likeliest token's probability, in 15 bins of equal width,
                         against how often the real next token is that one (Guo et al. 2017, arXiv 1706.04599, eq. 5)
positions                some of these by the position of the predicted token in its document, counted from 0, which is
                         the number of tokens before it. A document longer than a row starts again in the next row,
                         because a model does not see the tokens before
layers                   cosine similarity of both models' output of each decoder layer, before the final norm
standard_errors          by the jackknife over documents
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Tensor
from transformers import PreTrainedModel

from distillkit.config import UserError
from distillkit.distribution import DenseDistribution, at_least_float32
from distillkit.evaluation.chunks import Chunk, ModelPair, counted_batches
from distillkit.evaluation.divergence import NOTHING_TO_MEASURE
from distillkit.evaluation.jackknife import Named, jackknife
from distillkit.losses.divergences import jsd, kl, reverse_kl
from distillkit.losses.hidden_states import hs_cosine
from distillkit.teacher.live import LiveTeacher

BINS = 15
TOP = 5
MEANS = ("kl", "reverse_kl", "jsd", "agreement", "agreement_top5")
ROLES = ("teacher", "student")


@torch.no_grad()
def compare(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    num_tokens: int,
    sequence_length: int,
    vocabulary_size: int | None = None,
    position_buckets: Sequence[int] = (0,),
    layers: bool = True,
    chunk_tokens: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """The numbers of this suite, for JSON; None where they are unknown or not finite.

    Args:
        teacher, student: causal language models; batches go to the student's device.
        batches: as for `measure_divergence`.
        num_tokens: number of counted tokens, at most, that are measured.
        sequence_length: tokens of a row, at which the last bucket of positions ends.
        vocabulary_size: columns to which both models' logits are cut.
        position_buckets: first positions of the buckets, in ascending order.
        layers: compare hidden states too, if both models have the same depth and width.
        chunk_tokens: tokens whose logits exist at once; by default as many as fit in 256 MiB.
        progress: called with the number of tokens that are done, and `num_tokens`.

    Raises:
        UserError: no token counts.
    """
    compared = tuple(range(1, student.config.num_hidden_layers + 1)) if layers and _same_shape(teacher, student) else ()
    pair = ModelPair(LiveTeacher(teacher), student.eval(), vocabulary_size, chunk_tokens=chunk_tokens, layers=compared)
    edges = [*(edge for edge in position_buckets if edge < sequence_length), sequence_length]
    per_document: list[Named] = []
    done = 0
    for batch, rows in counted_batches(batches, num_tokens, pair.device):
        if len(rows) == 0:
            continue
        positions = batch["position_ids"].flatten()
        per_token = _per_token(pair, batch, rows)
        per_token |= _in_buckets(per_token, positions[rows].cpu() + 1, edges)
        per_document.append(_sums_per_document(per_token, (positions == 0).cumsum(0)[rows].cpu()))
        done += len(rows)
        progress(done, num_tokens)
    if done == 0:
        raise UserError(None, NOTHING_TO_MEASURE)
    sums = {name: torch.cat([each[name] for each in per_document]) for name in per_document[0]}
    return _as_json(*jackknife(_means, sums), sums, edges)


def _same_shape(teacher: PreTrainedModel, student: PreTrainedModel) -> bool:
    shapes = [(each.config.num_hidden_layers, each.config.hidden_size) for each in (teacher, student)]
    return shapes[0] == shapes[1]


def _per_token(pair: ModelPair, batch: Mapping[str, Tensor], rows: Int[Tensor, " rows"]) -> Named:
    """Numbers of each token that are summed, [rows] or [rows, width], by name."""
    outputs = pair.outputs(batch, rows)
    chunks = [_chunk_numbers(chunk) for chunk in outputs.chunks]
    joined = {name: torch.cat([chunk[name] for chunk in chunks]).cpu().double() for name in chunks[0]}
    for role in ROLES:
        confidence, correct = (joined.pop(f"{role}_{name}") for name in ("confidence", "correct"))
        bins = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)  # open at the lower end, as in Guo et al.
        joined[f"{role}_gaps"] = F.one_hot(bins, BINS) * (confidence - correct).unsqueeze(-1)
    cosines = [1 - hs_cosine(student, teacher)[0].cpu().double() for student, teacher in outputs.hidden_states]
    layers = {"layers": torch.stack(cosines, dim=-1)} if cosines else {}
    return {"tokens": torch.ones(len(rows), dtype=torch.float64), **joined, **layers}


def _chunk_numbers(chunk: Chunk) -> dict[str, Float[Tensor, " tokens"]]:
    assert isinstance(chunk.teacher, DenseDistribution)
    distributions = (chunk.logits, chunk.teacher, chunk.targets)
    logits = {"teacher": at_least_float32(chunk.teacher.logits), "student": chunk.logits}
    likeliest = {role: each.argmax(-1) for role, each in logits.items()}
    normalizers = {role: each.logsumexp(-1) for role, each in logits.items()}
    known = normalizers["teacher"].isfinite() & normalizers["student"].isfinite()
    agree = likeliest["teacher"] == likeliest["student"]
    top = chunk.logits.topk(min(TOP, chunk.logits.shape[-1])).indices
    among_top = (top == likeliest["teacher"].unsqueeze(-1)).any(
        -1
    ) | agree  # topk and argmax may break ties differently
    numbers = {
        "kl": kl(*distributions)[0],
        "reverse_kl": reverse_kl(*distributions)[0],
        "jsd": jsd(*distributions)[0],
        "agreement": agree.double().where(known, torch.nan),
        "agreement_top5": among_top.double().where(known, torch.nan),
    }
    for role in ROLES:
        numbers[f"{role}_nll"] = normalizers[role] - logits[role].gather(-1, chunk.targets.unsqueeze(-1)).squeeze(-1)
        numbers[f"{role}_confidence"] = (logits[role].amax(-1) - normalizers[role]).exp()
        numbers[f"{role}_correct"] = likeliest[role] == chunk.targets
    return numbers


def _in_buckets(per_token: Named, positions: Int[Tensor, " rows"], edges: Sequence[int]) -> Named:
    """Numbers that are summed by position, [rows, buckets]: those of a token in its bucket, 0 in the others."""
    bucket = torch.bucketize(positions, torch.tensor(edges), right=True)  # 0: before the first bucket
    inside = F.one_hot(bucket, len(edges) + 1)[:, 1:-1].double()
    names = ("tokens", "kl", "agreement", "teacher_nll", "student_nll")
    return {f"position_{name}": inside * per_token[name].unsqueeze(-1) for name in names}


def _sums_per_document(per_token: Named, document: Int[Tensor, " rows"]) -> Named:
    """Sums [documents, *width] by name. `document` is a number for each document."""
    numbers, index = document.unique(return_inverse=True)
    return {
        name: each.new_zeros(len(numbers), *each.shape[1:]).index_add(0, index, each)
        for name, each in per_token.items()
    }


def _means(sums: Named) -> Named:
    """The suite's numbers from sums over tokens; any leading dimensions are kept."""
    tokens = sums["tokens"]
    found = {name: sums[name] / tokens for name in MEANS}
    for role in ROLES:
        found[f"{role}_perplexity"] = (sums[f"{role}_nll"] / tokens).exp()
        found[f"{role}_ece"] = sums[f"{role}_gaps"].abs().sum(-1) / tokens
    for name in ("kl", "agreement"):
        found[f"position_{name}"] = sums[f"position_{name}"] / sums["position_tokens"]
    for role in ROLES:
        found[f"position_{role}_perplexity"] = (sums[f"position_{role}_nll"] / sums["position_tokens"]).exp()
    if "layers" in sums:
        found["layers"] = sums["layers"] / tokens.unsqueeze(-1)
    return found


def _as_json(values: Named, errors: Named, sums: Named, edges: Sequence[int]) -> dict[str, Any]:
    names = [name for name in values if not name.startswith(("position_", "layers"))]
    return {
        **{name: _finite(values[name]) for name in names},
        "tokens": int(sums["tokens"].sum()),
        "documents": len(sums["tokens"]),
        "standard_errors": {name: _finite(errors[name]) for name in names},
        "positions": list(_positions(values, errors, sums["position_tokens"].sum(0), edges)),
        "layers": [
            {"layer": layer, "cosine": _finite(value), "standard_error": _finite(error)}
            for layer, (value, error) in enumerate(zip(values["layers"], errors["layers"], strict=True))
        ]
        if "layers" in values
        else [],
    }


def _positions(
    values: Named, errors: Named, tokens: Float64[Tensor, " buckets"], edges: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """One entry for each bucket with tokens."""
    names = [name for name in values if name.startswith("position_")]
    for bucket, count in enumerate(tokens.long().tolist()):
        if count:
            yield {
                "from": edges[bucket],
                "to": edges[bucket + 1],
                "tokens": count,
                **{name.removeprefix("position_"): _finite(values[name][bucket]) for name in names},
                "standard_errors": {name.removeprefix("position_"): _finite(errors[name][bucket]) for name in names},
            }


def _finite(number: Tensor) -> float | None:
    return number.item() if number.isfinite() else None
