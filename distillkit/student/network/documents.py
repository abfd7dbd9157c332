"""Where sequences start and end in a batch: padding and packing, brought to one form.

A linear-attention layer has a state that must not flow from one document into the next, nor through padding. Padded
batches, packed rows and plain batches all become a flat list of documents here, once per forward pass; the layers
only ever see that.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import torch

CHUNK_SIZE = 64


@dataclass(frozen=True)
class ChunkPlan:
    """How documents fall into chunks, ordered so that a scan over chunks advances all documents side by side.

    slots: ``[tokens]``, the place of each token among ``num_chunks * CHUNK_SIZE`` places.
    steps: number of documents that still have a chunk at step 0, 1, 2 …; chunks of one step lie side by side.
    order: ``[documents]``, document indices from the longest to the shortest.
    """

    slots: torch.Tensor
    steps: list[int]
    order: torch.Tensor
    num_chunks: int


@dataclass(eq=False)
class Documents:
    """Documents laid end to end; not changed once made.

    Not frozen all the same: torch.compile 2.11 looks at all that a frozen dataclass holds, and would make a graph for
    each number of documents.

    lengths: tokens of each document, in order; 0 is allowed.
    index: ``[tokens]``, where each token lies in the flattened ``batch * tokens`` input; ``None`` if all of it is used.
    device: where the layers run.
    """

    lengths: tuple[int, ...]
    index: torch.Tensor | None
    device: torch.device

    @classmethod
    def rows(cls, batch: int, tokens: int, device: torch.device) -> "Documents":
        """Every row of a batch is one document."""
        make = _rows.__wrapped__ if torch.compiler.is_exporting() else _rows  # nothing of a trace may outlive it
        return make(batch, tokens, device)

    @classmethod
    def from_attention_mask(cls, attention_mask: torch.Tensor) -> "Documents | None":
        """One document per row, the tokens where ``attention_mask`` is not 0; ``None`` if that is all of them.

        attention_mask: ``[batch, tokens]``.
        """
        if bool(attention_mask.all()):
            return None
        lengths = attention_mask.ne(0).sum(-1).tolist()
        return cls(tuple(lengths), attention_mask.flatten().nonzero().squeeze(-1), attention_mask.device)

    @classmethod
    def from_position_ids(cls, position_ids: torch.Tensor) -> "Documents | None":
        """A document starts in each row and wherever ``position_ids`` ``[batch, tokens]`` do not go on by one."""
        starts = torch.ones_like(position_ids, dtype=torch.bool)
        starts[:, 1:] = position_ids.diff(dim=-1) != 1
        first_tokens = starts.flatten().nonzero().squeeze(-1)
        if len(first_tokens) == len(position_ids):
            return None
        boundaries = [*first_tokens.tolist(), position_ids.numel()]
        return cls.from_boundaries(boundaries, position_ids.device)

    @classmethod
    def from_boundaries(cls, boundaries: list[int], device: torch.device) -> "Documents":
        """Boundaries as in ``cu_seqlens``: 0, the end of the first document, …, the number of tokens."""
        return cls(tuple(end - start for start, end in pairwise(boundaries)), None, device)

    @property
    def count(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str | int, **kwargs: Any) -> "Documents":
        """On another device, the same object for every layer there; accelerate moves inputs of layers so."""
        device = torch.empty(0, device=device).device
        if device == self.device:
            return self
        if device not in self.elsewhere:
            index = None if self.index is None else self.index.to(device, **kwargs)
            self.elsewhere[device] = Documents(self.lengths, index, device)
        return self.elsewhere[device]

    @cached_property
    def elsewhere(self) -> dict[torch.device, "Documents"]:
        """Copies on other devices."""
        return {}

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """``[documents + 1]``, int64: start of each document, then the number of tokens."""
        lengths = torch.tensor((0, *self.lengths), dtype=torch.long, device=self.device)
        return lengths.cumsum(0)

    @cached_property
    def position_ids(self) -> torch.Tensor:
        """``[tokens]``: position of each token in its document."""
        lengths = torch.tensor(self.lengths, device=self.device)
        starts = self.cu_seqlens[:-1].repeat_interleave(lengths)
        return torch.arange(sum(self.lengths), device=self.device) - starts

    def first(self, kept: int, batch: int, tokens: int) -> "Documents | None":
        """Of rows ``[batch, tokens]`` with padding, the documents in their first ``kept`` tokens."""
        used = torch.zeros(batch * tokens, dtype=torch.bool, device=self.device)
        used[slice(None) if self.index is None else self.index] = True
        return Documents.from_attention_mask(used.view(batch, tokens)[:, :kept])

    def flatten(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, tokens, ...]`` → ``[1, document tokens, ...]``."""
        x = x.flatten(0, 1)
        return (x if self.index is None else x.index_select(0, self.index)).unsqueeze(0)

    def restore(self, x: torch.Tensor, batch: int, tokens: int) -> torch.Tensor:
        """The inverse of ``flatten``; what was padding is 0."""
        x = x.squeeze(0)
        if self.index is not None:
            x = x.new_zeros(batch * tokens, *x.shape[1:]).index_copy(0, self.index, x)
        return x.unflatten(0, (batch, tokens))

    @cached_property
    def chunk_plan(self) -> ChunkPlan:
        """Every document cut into chunks of ``CHUNK_SIZE`` tokens, the last one of each part empty."""
        counts = [-(-length // CHUNK_SIZE) for length in self.lengths]
        longest_first = sorted(range(self.count), key=lambda document: -counts[document])
        steps = [sum(count > step for count in counts) for step in range(max(counts, default=0))]
        order = torch.tensor(longest_first, dtype=torch.long, device=self.device)
        rank = order.argsort().repeat_interleave(torch.tensor(self.lengths, device=self.device))
        first_chunk_of_step = torch.tensor([0, *steps], device=self.device).cumsum(0)
        chunk = first_chunk_of_step[self.position_ids // CHUNK_SIZE] + rank
        return ChunkPlan(chunk * CHUNK_SIZE + self.position_ids % CHUNK_SIZE, steps, order, sum(steps))


@lru_cache(maxsize=4)  # every layer of a model asks for the same
def _rows(batch: int, tokens: int, device: torch.device) -> Documents:
    documents = Documents((tokens,) * batch, None, device)
    with torch.inference_mode(False):  # made in inference, they must serve training too
        _ = documents.cu_seqlens, documents.position_ids, documents.chunk_plan
    return documents
