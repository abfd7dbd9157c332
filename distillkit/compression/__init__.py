"""Teacher distributions as few bytes, and back: the codecs of the published formats."""

from distillkit.compression.codec import Codec as Codec
from distillkit.compression.formats import SIGNAL_COLUMNS as SIGNAL_COLUMNS
from distillkit.compression.formats import build_codec as build_codec
