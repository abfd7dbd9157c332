"""What a teacher said, as few bytes, and back: the codecs of the published formats."""

from distillkit.compression.codec import SIGNAL_COLUMNS as SIGNAL_COLUMNS
from distillkit.compression.codec import Codec as Codec
from distillkit.compression.codec import build_codec as build_codec
