"""How much of a teacher distribution is lost where only its likeliest tokens are stored, by a lossy codec."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from distillkit.capture.transformers_engine import TransformersEngine
from distillkit.compression import Codec
from distillkit.config import UserError
from distillkit.distribution import DenseDistribution, SparseDistribution, at_least_float32
from distillkit.losses.divergences import over_vocabulary
from distillkit.shards import Manifest, signal_tensor


@dataclass(frozen=True)
class Fidelity:
    """Means over tokens."""

    tokens: int
    top_k_mass: float
    """Probability that the teacher gives to the stored tokens."""
    kl_uniform: float
    """KL(teacher ‖ stored) in nats, the remaining probability spread uniformly over the tokens that are not stored."""
    kl_background: float | None
    """The same, with the remaining probability spread like the background distribution; None where there is none."""


@dataclass(frozen=True)
class StoredRow:
    """One row of the dataset, decoded."""

    input_ids: list[int]
    seq_lengths: list[int]
    distribution: SparseDistribution


class FidelityMeter:
    """Sums over tokens, a chunk at a time.

    Args:
        background: log-distribution over the vocabulary for the probability outside the stored tokens.
    """

    def __init__(self, background: Float[Tensor, " vocab"] | None) -> None:
        self._background = background
        self.tokens = 0
        self._sums = torch.zeros(3, dtype=torch.float64)

    @torch.no_grad()
    def add(self, teacher: DenseDistribution, stored: SparseDistribution) -> None:
        """Add some tokens: the teacher's distributions, and the stored ones."""
        logprobs = at_least_float32(teacher.logits).log_softmax(-1)
        mass = logprobs.gather(-1, stored.ids).exp().masked_fill(~stored.present, 0).sum(-1)
        flat = logprobs.new_zeros(logprobs.shape[-1])
        uniform = _divergence(logprobs, stored, flat)
        if self._background is None:
            background = torch.zeros_like(uniform)
        else:
            background = _divergence(logprobs, stored, self._background.to(logprobs))
        self.tokens += len(logprobs)
        self._sums += torch.stack([each.double().sum() for each in (mass, uniform, background)]).cpu()

    def result(self) -> Fidelity:
        """The means over all tokens so far."""
        mass, uniform, background = (self._sums / max(self.tokens, 1)).tolist()
        return Fidelity(self.tokens, mass, uniform, None if self._background is None else background)


def stored_rows(folder: Path, manifest: Manifest, codec: Codec) -> Iterator[StoredRow]:
    """All rows, one at a time, decoded on the CPU."""
    names = ["input_ids", "seq_lengths", *codec.columns]
    for record in manifest.shards:
        try:
            with pq.ParquetFile(folder / record.file) as file:
                for batch in file.iter_batches(batch_size=1, columns=names):
                    table = pa.table(batch)
                    columns = {name: signal_tensor(table[name], name) for name in codec.columns}
                    input_ids, seq_lengths = (table[name][0].as_py() for name in names[:2])
                    yield StoredRow(input_ids, seq_lengths, codec.decode(columns))
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                record.file, f"cannot be read ({error}); distillkit inspect --verify names all damaged shards"
            ) from error


def measure(
    engine: TransformersEngine, rows: Iterable[StoredRow], background: Float[Tensor, " vocab"] | None, tokens: int
) -> Fidelity:
    """How much of a live teacher's distributions is stored in rows, until so many tokens are compared."""
    meter = FidelityMeter(background)
    for row in rows:
        ids, logprobs = row.distribution.ids.to(engine.device), row.distribution.logprobs.to(engine.device)
        start = 0
        for dense in engine.whole([{"input_ids": row.input_ids, "seq_lengths": row.seq_lengths}]):
            chunk = slice(start, start + len(dense.logits))
            meter.add(dense, SparseDistribution(ids[chunk], logprobs[chunk]))
            if meter.tokens >= tokens:
                return meter.result()
            start = chunk.stop
    return meter.result()


def _divergence(
    log_p: Float[Tensor, "tokens vocab"], stored: SparseDistribution, background: Float[Tensor, " vocab"]
) -> Float[Tensor, " tokens"]:
    """KL(teacher ‖ stored) as the loss computes it, with the stored distribution as the student's."""
    log_q = over_vocabulary(replace(stored, background=background)).log_softmax(-1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)
