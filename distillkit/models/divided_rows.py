"""Rows whose tokens lie on several processes, and full attention over them: the attention implementation `divided`.

Each process of a group has an equal, contiguous part of every row. What mixes tokens needs whole rows, and treats its
heads alike: before it each process gives away its tokens of the other processes' heads and gets all tokens of its own,
and afterwards the other way round (all-to-all, DeepSpeed-Ulysses, arXiv 2309.14509). Boundaries of documents, windows
and kernels are those of whole rows. Where no rows are divided, `divided` is `varlen`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv

from distillkit.models.labels import IGNORED_LABEL
from distillkit.models.varlen_attention import attention_dtype, document_boundaries, varlen_attention, varlen_mask

DIVIDED = "divided"


@dataclass(eq=False)
class DividedRows:
    """The rows of a batch, of each an equal part on each process of `group`, in their order.

    position_ids: of the whole rows; they start again at each document.
    """

    group: ProcessGroup
    position_ids: Int[Tensor, "batch tokens"]

    @property
    def batch(self) -> int:
        return self.position_ids.shape[0]

    @property
    def processes(self) -> int:
        return self.group.size()

    @cached_property
    def boundaries(self) -> tuple[Int[Tensor, " documents_and_1"], int]:
        """`cu_seqlens` of the documents of all rows, laid end to end, and the longest document."""
        return document_boundaries(self.position_ids.reshape(1, -1))

    def to_heads(self, *parts: Shaped[Tensor, "batch part _ _"]) -> list[Shaped[Tensor, "batch tokens _ _"]]:
        """[batch, part, heads, size] of this process's tokens → all tokens of its heads, in one exchange.

        Where heads do not divide, the last process gets some of zeros. All tensors have one dtype.
        """
        sent = [_padded_heads(part, self.processes).unflatten(2, (self.processes, -1)).movedim(2, 0) for part in parts]
        received = self._exchange(torch.cat([part.flatten(1) for part in sent], dim=1))
        pieces = received.split([part[0].numel() for part in sent], dim=1)
        return [piece.view(part.shape).movedim(0, 1).flatten(1, 2) for piece, part in zip(pieces, sent, strict=True)]

    def to_tokens(self, whole: Shaped[Tensor, "batch tokens _ _"], heads: int) -> Shaped[Tensor, "batch part _ _"]:
        """The inverse of `to_heads` for a tensor of so many heads on all processes."""
        sent = whole.unflatten(1, (self.processes, -1)).movedim(1, 0)
        received = self._exchange(sent.flatten(1)).view(sent.shape)
        return received.movedim(0, 2).flatten(2, 3)[:, :, :heads]

    def own_heads(self, of_all: Shaped[Tensor, "heads *_"]) -> Shaped[Tensor, "own_heads *_"]:
        """Those that `to_heads` gives this process; of zeros where there are no more."""
        missing = -len(of_all) % self.processes
        padded = torch.cat([of_all, of_all.new_zeros(missing, *of_all.shape[1:])])
        return padded.chunk(self.processes)[self.group.rank()]

    def _exchange(self, sent: Shaped[Tensor, "processes numbers"]) -> Shaped[Tensor, "processes numbers"]:
        exchanged: Tensor = _Exchange.apply(sent.contiguous(), self.group)
        return exchanged


class _Exchange(torch.autograd.Function):
    """All-to-all: the i-th row goes to process i. What comes back of a gradient goes the same way."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(sent)
        torch.distributed.all_to_all_single(received, sent, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(gradient.contiguous(), ctx.group), None


def _padded_heads(x: Shaped[Tensor, "batch part _ _"], processes: int) -> Shaped[Tensor, "batch part _ _"]:
    return F.pad(x, (0, 0, 0, -x.shape[2] % processes))


_current: DividedRows | None = None


def divided_rows() -> DividedRows | None:
    """The rows that models are given parts of; None where they are given whole ones."""
    return _current


def set_divided_rows(rows: DividedRows | None) -> None:
    """From here on models are given parts of these rows."""
    global _current
    _current = rows


@contextmanager
def whole_rows() -> Iterator[None]:
    """Within, models are given whole rows."""
    rows = _current
    set_divided_rows(None)
    try:
        yield
    finally:
        set_divided_rows(rows)


@dataclass(frozen=True)
class Context:
    """The processes that share rows. mesh: [groups, processes of a group], named as accelerate's data loader wants."""

    mesh: DeviceMesh

    @property
    def group(self) -> ProcessGroup:
        """This process's."""
        return self.mesh["cp"].get_group()

    @property
    def size(self) -> int:
        """Processes of a group."""
        return self.group.size()

    def part_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's part of the rows of a batch, of which models then know that it is one.

        Rows are padded to equal parts. What is not [batch, tokens, …] stays as it is.
        """
        layout, rank = batch["position_ids"].shape, self.group.rank()
        length = -(-layout[1] // self.size)
        missing = length * self.size - layout[1]
        whole = {
            name: _padded(tensor, missing, IGNORED_LABEL if name == "targets" else 0)
            for name, tensor in batch.items()
            if tensor.shape[:2] == layout
        }
        set_divided_rows(DividedRows(self.group, whole["position_ids"]))
        part = slice(length * rank, length * (rank + 1))
        return {**batch, **{name: tensor[:, part].contiguous() for name, tensor in whole.items()}}

    def sums(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Of all processes of the group, of which each may lack some of the names."""
        gathered: list[Mapping[str, float]] = [{}] * self.size
        torch.distributed.all_gather_object(gathered, dict(numbers), group=self.group)
        names = dict.fromkeys(name for each in gathered for name in each)
        return {name: sum(each.get(name, 0.0) for each in gathered) for name in names}


def _padded(x: Shaped[Tensor, "batch tokens *_"], missing: int, value: int) -> Shaped[Tensor, "batch more_tokens *_"]:
    return F.pad(x, (*(0, 0) * (x.dim() - 2), 0, missing), value=value) if missing else x


@torch.compiler.disable
def divided_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads part head_dim"],
    key: Float[Tensor, "batch kv_heads part head_dim"],
    value: Float[Tensor, "batch kv_heads part value_dim"],
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Float[Tensor, "batch part heads value_dim"], None]:
    """Causal attention within documents of divided rows; an attention function of transformers."""
    rows = divided_rows()
    if rows is None:
        output, _ = varlen_attention(module, query, key, value, attention_mask, **options)
        return output, None
    heads = query.shape[1]
    if key.shape[1] % rows.processes:
        key, value = (repeat_kv(x, heads // x.shape[1]) for x in (key, value))
    dtype = attention_dtype(value)  # rotated queries and keys are in float32 beside masters, twice the bytes to send
    parts = rows.to_heads(*(x.to(dtype).transpose(1, 2) for x in (query, key, value)))
    cu_seqlens, longest = rows.boundaries
    boundaries = {"cu_seq_lens_q": cu_seqlens, "max_length_q": longest}
    packed = (x.flatten(0, 1).transpose(0, 1).unsqueeze(0) for x in parts)
    output, _ = varlen_attention(module, *packed, None, **{**options, **boundaries})
    return rows.to_tokens(output.view(rows.batch, -1, *output.shape[2:]), heads), None


def _divided_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return varlen_mask(*args, **kwargs) if divided_rows() is None else None


AttentionInterface.register(DIVIDED, divided_attention)
AttentionMaskInterface.register(DIVIDED, _divided_mask)
