"""How several processes divide the shards of a capture among themselves, without communication."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from distillkit.config.errors import UserError, shown


@dataclass(frozen=True)
class Share:
    """Every `count`-th shard, starting from the `index`-th; indices count from 0."""

    index: int = 0
    count: int = 1

    def has(self, shard: int) -> bool:
        """Whether the shard is one of this share."""
        return shard % self.count == self.index


def find_share(option: str | None, environment: Mapping[str, str] = os.environ) -> Share:
    """The share of `--shard i/n`, or of torchrun's RANK and WORLD_SIZE; all shards by default.

    Raises `UserError` for an invalid option, and where both are given.
    """
    count = int(environment.get("WORLD_SIZE", "1"))
    if option is None:
        return Share(int(environment.get("RANK", "0")), count)
    if count > 1:
        raise UserError("--shard", "torchrun's processes share the shards already; use torchrun or --shard, not both")
    found = re.fullmatch(r"(\d+)/(\d+)", option)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError("--shard", f"must be i/n with i from 1 to n, such as 1/4, got {shown(option)}")
    return Share(int(found[1]) - 1, int(found[2]))
