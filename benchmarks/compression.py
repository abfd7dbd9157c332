"""What codecs of captured teachers take: bytes per token, and tokens per second of encoding and decoding.

    python benchmarks/compression.py
    python benchmarks/compression.py --device cuda --output compression_cuda.json

Encoded are the likeliest tokens of random distributions. What a codec loses of a teacher is measured where it is used:
by `distillkit capture` at its end, and by `distillkit inspect DATASET --teacher TEACHER`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch

from distillkit.compression import build_codec
from distillkit.distribution import DenseDistribution
from frame import Json, Options, option, run, seconds_of

SHARED = {"exact_dtype": "bfloat16", "term_dtype": "float32", "delta_encoding": False}
CODECS: dict[str, Json] = {
    "recommended": {"k": 128, "exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"], **SHARED},
    "budget": {"k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"], **SHARED},
}
DISTINCT = 1024
"""Distributions; more tokens are these again."""


@dataclass(kw_only=True)
class CompressionOptions(Options):
    tokens: int = option(65536, "encoded at a time")
    vocabulary: int = option(49152)
    repeats: int = option(9)
    device: str = option("cpu")


@torch.inference_mode()
def measure(options: CompressionOptions) -> Iterator[Json]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(min(DISTINCT, options.tokens), options.vocabulary, generator=generator)
    teacher = DenseDistribution(logits.to(options.device).log_softmax(-1))
    for name, config in CODECS.items():
        codec = build_codec("logprob_compressor", {"d": options.vocabulary, **config})
        top = teacher.top_k(codec.k)
        times = -(-options.tokens // len(top.ids))
        repeated = type(top)(top.ids.repeat(times, 1), top.logprobs.repeat(times, 1))
        stored = codec.encode(repeated)

        def rate(work: Callable[[], object], tokens: int = len(repeated.ids)) -> int:
            return round(tokens / median(seconds_of(work, options.repeats, warm_up=1)))

        rates = {"encode": rate(lambda: codec.encode(repeated)), "decode": rate(lambda: codec.decode(stored))}  # noqa: B023
        yield {"name": name, "bytes_per_token": codec.bytes_per_token, "tokens_per_second": rates}


def settings(options: CompressionOptions, _: list[Json]) -> Json:
    return options.settings("device", "vocabulary", "tokens")


if __name__ == "__main__":
    run(CompressionOptions, measure, "bytes per token, encoding and decoding speed of codecs", more=settings)
