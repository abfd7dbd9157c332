"""What a codec is, and the one that a name and a configuration stand for."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from distillkit.compression.legacy import LegacyLogitCompressor
from distillkit.compression.plain import Plain
from distillkit.compression.published import LogprobCompressor
from distillkit.config.compression import LegacyLogitCompressionConfig, LogprobCompressorConfig, PlainConfig
from distillkit.config.errors import UserError, one_of
from distillkit.config.section import Section
from distillkit.distribution import SparseDistribution


class Codec(Protocol):
    """A way to store the k likeliest tokens of each row.

    `columns` are the names that a dataset stores them under. Shapes may have more leading dimensions than one.
    """

    @property
    def kind(self) -> str: ...
    @property
    def config(self) -> Section: ...
    @property
    def columns(self) -> tuple[str, ...]: ...
    @property
    def k(self) -> int: ...
    @property
    def vocabulary_size(self) -> int: ...
    @property
    def bytes_per_token(self) -> int: ...

    def encode(self, distribution: SparseDistribution) -> dict[str, Tensor]:
        """Columns [tokens, width], each of the type that is stored."""
        ...

    def decode(self, columns: Mapping[str, Tensor]) -> SparseDistribution:
        """What the columns say, on their device, likeliest token first."""
        ...


_KINDS: dict[str, tuple[type[Section], Callable[[Any], Codec]]] = {
    "logprob_compressor": (LogprobCompressorConfig, LogprobCompressor),
    "legacy_logit_compression": (LegacyLogitCompressionConfig, LegacyLogitCompressor),
    "plain": (PlainConfig, Plain),
}

SIGNAL_COLUMNS = frozenset(LogprobCompressor.columns + LegacyLogitCompressor.columns + Plain.columns)
"""The names that a token's signal is known by, in any format."""


def build_codec(kind: str, config: Mapping[str, Any] | Section) -> Codec:
    """The codec that the YAML calls `kind`, with its section as it is there or parsed.

    Raises UserError for an unknown kind and for what the section may not say.
    """
    if kind not in _KINDS:
        raise UserError("compression", one_of(kind, list(_KINDS)))
    section, codec = _KINDS[kind]
    if isinstance(config, section):
        return codec(config)
    try:
        return codec(section.parse(config.model_dump() if isinstance(config, Section) else dict(config)))
    except UserError as error:
        raise error.under(kind) from None
