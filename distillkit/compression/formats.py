"""The formats that a codec can have, by the names of their sections in the YAML."""

from collections.abc import Callable, Mapping
from typing import Any

from distillkit.compression.codec import Codec
from distillkit.compression.legacy import LegacyLogitCompressor
from distillkit.compression.plain import Plain
from distillkit.compression.published import LogprobCompressor
from distillkit.config.compression import LegacyLogitCompressionConfig, LogprobCompressorConfig, PlainConfig
from distillkit.config.errors import UserError, one_of
from distillkit.config.section import Section

_FORMATS: dict[str, tuple[type[Section], Callable[[Any], Codec]]] = {
    LogprobCompressor.kind: (LogprobCompressorConfig, LogprobCompressor),
    LegacyLogitCompressor.kind: (LegacyLogitCompressionConfig, LegacyLogitCompressor),
    Plain.kind: (PlainConfig, Plain),
}

SIGNAL_COLUMNS = frozenset(LogprobCompressor.columns + LegacyLogitCompressor.columns + Plain.columns)
"""Names of the columns that hold a teacher's outputs, in any format."""


def build_codec(kind: str, config: Mapping[str, Any] | Section) -> Codec:
    """The codec of the format `kind`.

    config: the section of that name in the YAML, as a mapping or parsed.

    Raises UserError for an unknown format and for a wrong value in the section.
    """
    if kind not in _FORMATS:
        raise UserError("compression", one_of(kind, list(_FORMATS)))
    section, codec = _FORMATS[kind]
    if isinstance(config, section):
        return codec(config)
    try:
        return codec(section.parse(config.model_dump() if isinstance(config, Section) else dict(config)))
    except UserError as error:
        raise error.under(kind) from None
