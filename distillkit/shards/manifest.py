"""`manifest.json`: what a captured dataset holds. It is written last, so a dataset that has one is complete.

It holds no times: the same capture gives the same file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillkit.config.errors import UserError
from distillkit.runs.writing import write_whole
from distillkit.shards.files import ShardRecord
from distillkit.shards.names import CARD, MANIFEST, TOKENIZER, inside
from distillkit.shards.sealed import read_sealed, write_sealed

_CARD = """---
configs:
- config_name: default
  data_files: "*.parquet"
---
A dataset captured by distillkit: tokens, and what the teacher {teacher} says of each next one.

The columns are compressed by `{codec}`; `manifest.json` says with what options, and all else that is known.
"""
"""Without it the datasets library would read the JSON files beside the shards as rows."""

FORMAT = 1
"""Version of the file and the shards, increased when an older reader would misread them."""


@dataclass(frozen=True)
class Manifest:
    """What a captured dataset holds, what it was made from and with, and its shards in order."""

    codec_kind: str
    codec_config: dict[str, Any]
    tokenizer_sha256: str | None
    """As `distillkit.data.tokenizer_hash` computes it."""
    vocabulary_size: int
    """Columns of the teacher's head."""
    teacher: dict[str, Any]
    """Its path or id, its revision, and how it was loaded."""
    capture: dict[str, Any]
    """The rest of the configuration."""
    versions: dict[str, str]
    shards: tuple[ShardRecord, ...]
    background: str | None
    """Name of the file with the background distribution, that of the probability outside the top k."""
    packed_to: int | None
    """Tokens that rows were packed to; None where a row is a document or a piece of one."""
    background_sha256: str | None = None
    """None where it is unknown."""
    tokenizer_files: dict[str, str] | None = None
    """SHA-256 of the files in the folder of the teacher's tokenizer, by name; None where they are unknown."""
    format: int = FORMAT

    @property
    def rows(self) -> int:
        return self.shards[-1].rows[1] if self.shards else 0

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, complete or not at all, and a `README.md` by which the datasets library finds the rows."""
    card = _CARD.format(teacher=manifest.teacher.get("path", ""), codec=manifest.codec_kind)
    write_whole(folder / CARD, card.encode())
    write_sealed(folder / MANIFEST, manifest)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a captured dataset; None where there is none, as in published datasets.

    Raises `UserError` where the file is no manifest, is damaged, has a newer format, or names a file that is not in
    the folder: the dataset may be somebody else's.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None

    def check(manifest: Manifest) -> None:
        for shard in manifest.shards:
            inside(folder, shard.file, f"{MANIFEST}: shards")
        if manifest.background is not None:
            inside(folder, manifest.background, f"{MANIFEST}: background")
        for name in manifest.tokenizer_files or ():
            inside(folder, f"{TOKENIZER}/{name}", f"{MANIFEST}: tokenizer_files")

    try:
        return read_sealed(path, Manifest, FORMAT, check)
    except (OSError, ValueError) as error:
        raise UserError(path, f"is no manifest of a captured dataset: {error}") from error
