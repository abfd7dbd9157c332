"""How several processes divide the shards of a capture among themselves, without communication."""

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
    index, count = (_number(environment, name, least) for name, least in (("RANK", 0), ("WORLD_SIZE", 1)))
    if option is None:
        if index >= count:
            raise UserError("RANK", f"must be below WORLD_SIZE ({count}), got {index}")
        return Share(index, count)
    if count > 1:
        raise UserError("--shard", "torchrun's processes share the shards already; use torchrun or --shard, not both")
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", option)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError("--shard", f"must be i/n with i from 1 to n, such as 1/4, got {shown(option)}")
    return Share(int(found[1]) - 1, int(found[2]))


def _number(environment: Mapping[str, str], name: str, least: int) -> int:
    """A number that torchrun puts into the environment; `least` by default."""
    text = environment.get(name, str(least))
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise UserError(name, f"must be a whole number >= {least}, as torchrun sets it; got {shown(text)}")
    return int(text)
