"""The processes of a run, one for each GPU: which rows they read, what they send each other, how long that takes."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from distillkit.config.parallel import ParallelConfig
from distillkit.models.divided_rows import Context, whole_rows
from distillkit.planning.gpus import GPU, LINK_SHARE, NETWORK
from distillkit.planning.ledger import ALL_REDUCE, ALL_TO_ALL, Collective
from distillkit.training.context import context_among
from distillkit.training.parallel import Mesh, mesh_of


@dataclass(frozen=True)
class Processes:
    """gpus: of each node. parallel: None where each process holds the models whole."""

    gpus: int = 1
    nodes: int = 1
    parallel: ParallelConfig | None = None

    @classmethod
    def of(cls, parallel: ParallelConfig | None, gpus: int | None, nodes: int) -> "Processes":
        """Those of a run. gpus: None for as many as `parallel` names at least.

        Raises `UserError` where `parallel` divides the models over another number.
        """
        if gpus is None:
            given = parallel or ParallelConfig(shard=1)
            gpus = max(given.replicate * (given.context if given.shard == "auto" else given.shard) // nodes, 1)
        found = cls(gpus, nodes, parallel)
        if parallel is not None:
            parallel.sizes(found.count)
        return found

    @property
    def count(self) -> int:
        return self.gpus * self.nodes

    @property
    def context(self) -> int:
        """So many share each row."""
        return 1 if self.parallel is None else self.parallel.context

    @property
    def readers(self) -> int:
        """How many groups of them read rows of their own."""
        return self.count // self.context

    def tokens(self, length: int) -> int:
        """How many of a row's tokens a process has, those that fill the row up included."""
        return -(-length // self.context)

    @property
    def replicate(self) -> int:
        """Copies of the models among them."""
        return self.count // self.shard

    @property
    def shard(self) -> int:
        """So many hold one copy together."""
        return 1 if self.parallel is None else self.parallel.sizes(self.count)[1]

    @contextmanager
    def meshes(self) -> Iterator[tuple[Mesh, Context | None]]:
        """Over which they divide models and rows, as the first of them has it; the others need not be there."""
        if self.shard == self.context == 1:
            yield None, None
            return
        torch.distributed.init_process_group("fake", rank=0, world_size=self.count, store=FakeStore())
        processes = (self.parallel, self.count, torch.device("cpu"))
        try:
            with whole_rows():
                yield mesh_of(*processes), context_among(*processes)
        finally:
            torch.distributed.destroy_process_group()

    def traffic(self, collectives: Iterable[Collective]) -> "Traffic":
        """What the first of them sends: all but one part of n, in an all-reduce twice.

        All but all-to-all go in rings. A ring leaves a node once, and as many leave from each GPU that takes part.
        """
        kinds, links = defaultdict[str, float](float), defaultdict[tuple[str, bool], float](float)
        for each in collectives:
            number, nodes = len(each.ranks), len({rank // self.gpus for rank in each.ranks})
            sent = each.size * (number - 1) / number * (2 if each.kind == ALL_REDUCE else 1)
            kinds[each.kind] += sent
            if each.kind == ALL_TO_ALL:
                leaving = each.size * (1 - 1 / nodes)
            else:
                leaving = sent * nodes / number if nodes > 1 else 0.0
            links["inside", each.alone] += sent - leaving
            links["between", each.alone] += leaving
        inside, between = ((links[link, False], links[link, True]) for link in ("inside", "between"))
        return Traffic(dict(kinds), sum(inside), sum(between), inside[1], between[1])


@dataclass(frozen=True)
class Traffic:
    """Bytes that a GPU sends in a micro-batch; it receives as many.

    kinds: by collective. inside: over the links of its node, between: to other nodes; and what of both is sent while
    there is nothing to compute.
    """

    kinds: dict[str, float]
    inside: float
    between: float
    inside_alone: float
    between_alone: float

    def seconds(self, gpu: GPU) -> tuple[float, float]:
        """(all, what of it nothing overlaps). Links and network work at a time."""

        def of(inside: float, between: float) -> float:
            return max(inside / (gpu.link * LINK_SHARE), between / (NETWORK * LINK_SHARE))

        return of(self.inside, self.between), of(self.inside_alone, self.between_alone)
