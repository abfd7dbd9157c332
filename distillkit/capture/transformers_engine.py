"""A teacher run by transformers, on the CPU or a GPU."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from distillkit.capture.engines import Row, TopKBatch
from distillkit.data import collate
from distillkit.distribution import DenseDistribution, SparseDistribution, at_least_float32
from distillkit.models.decoder import head
from distillkit.models.loading import load_model
from distillkit.teacher.live import LiveTeacher

CHUNK_BYTES = {"cpu": 2**26}
CHUNK_BYTES_ELSEWHERE = 2**29
"""Memory for the float32 logits of a chunk. Larger chunks are not faster."""


def load_teacher(path: str, kwargs: Mapping[str, Any]) -> PreTrainedModel:
    """The teacher, on the GPU of this process where there is one and `device_map` says nothing else."""
    model = load_model(path, key="teacher.path", **kwargs)
    if "device_map" not in kwargs and torch.cuda.is_available():
        model = model.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    return model


class TransformersEngine:
    """Runs batches of rows of similar length, and the head on a chunk of their tokens at a time.

    Args:
        model: the teacher, on its device.
        tokens_per_batch: tokens of a batch, with padding; a longer row is a batch of its own.
    """

    def __init__(self, model: PreTrainedModel, tokens_per_batch: int) -> None:
        self._teacher = LiveTeacher(model)
        self._tokens_per_batch = tokens_per_batch
        weight, _ = head(model)
        self.vocabulary_size: int = weight.shape[0]
        self.device = weight.device

    def top_k(self, rows: Sequence[Row], k: int, outside: Float[Tensor, " vocab"] | None = None) -> Iterator[TopKBatch]:
        """See `Engine`."""
        for batch in batches(rows, self._tokens_per_batch):
            parts = []
            for dense in self.whole([rows[index] for index in batch]):
                part = dense.top_k(k)
                if outside is not None:
                    outside += _outside(dense, part).to(outside)
                parts.append(part)
            ids, logprobs = (torch.cat(each) for each in zip(*((p.ids, p.logprobs) for p in parts), strict=True))
            if bool(logprobs.isnan().any()):
                self._teacher.check_outputs(self._collated([rows[index] for index in batch]))
            yield TopKBatch(batch, SparseDistribution(ids, logprobs))

    @torch.no_grad()
    def whole(self, rows: Sequence[Row]) -> Iterator[DenseDistribution]:
        """The teacher's logits at each token of the rows, run as one batch, a chunk of tokens at a time."""
        on_device = self._collated(rows)
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        tokens = (torch.arange(on_device["input_ids"].shape[1]) < lengths[:, None]).flatten().nonzero().squeeze(-1)
        chunks = self._teacher.signal(on_device).distribution(tokens.to(self.device))
        most = CHUNK_BYTES.get(self.device.type, CHUNK_BYTES_ELSEWHERE)
        step = max(1, most // (4 * self.vocabulary_size))
        for start in range(0, len(tokens), step):
            dense = chunks(slice(start, start + step))
            assert isinstance(dense, DenseDistribution)
            yield dense

    def _collated(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = collate([{**row, "labels": row["input_ids"]} for row in rows], pad_token_id=0)
        return {name: batch[name].to(self.device) for name in ("input_ids", "position_ids")}


def batches(rows: Sequence[Row], tokens_per_batch: int) -> Iterator[list[int]]:
    """Batches of indices of rows, longest row first, as large as fits into `tokens_per_batch` with padding."""
    lengths = [len(row["input_ids"]) for row in rows]
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: (-lengths[index], index)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens_per_batch:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _outside(dense: DenseDistribution, top: SparseDistribution) -> Float[Tensor, " vocab"]:
    probabilities = at_least_float32(dense.logits).softmax(-1)
    return probabilities.scatter_(-1, top.ids, 0).sum(0)
