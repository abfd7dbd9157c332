"""What compressed teachers cost and keep: bytes/token, divergence from the teacher, speed of encoding and decoding.

    python benchmarks/compression.py --teacher SmolLM2-135M-Instruct.Q4_1.gguf --data valid.parquet
    python benchmarks/compression.py --teacher FOLDER --tokens 512 --background-tokens 512 --output small.json

Text is column `text` of a parquet file, or the language reference that CPython carries. The teacher runs over it in
sequences. On the first part of the tokens its mass outside the k likeliest is averaged: that is the background. On the
rest, KL(teacher ‖ stored) over the whole vocabulary, in nats, is measured under three readings of what is stored:

    zero         the k stored probabilities normalised, against the teacher's k likeliest normalised alike; the
                 teacher's other tokens do not count (they would make the divergence infinite)
    uniform      what the k leave of 1, spread evenly over all other tokens
    background   the same, spread over them as the background is

If the k leave nothing, as a curve may lie above what it approximates, the others get the resolution of float32 and
the whole is normalised. `plain` is ids of 4 bytes and log-probabilities rounded to bfloat16; nothing is timed there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import pyarrow.parquet
import torch

from distillkit.compression import Codec, build_codec
from distillkit.distribution import DenseDistribution, SparseDistribution
from distillkit.losses.divergences import over_vocabulary
from distillkit.models.loading import load_model, load_tokenizer
from distillkit.shards import fitted_background
from frame import Json, TeacherOptions, option, parse, save, seconds_of

SHARED = {"exact_dtype": "bfloat16", "term_dtype": "float32", "delta_encoding": False}
CONFIGURATIONS: dict[str, Json] = {
    "recommended": {"k": 128, "exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"], **SHARED},
    "budget": {"k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"], **SHARED},
}
READINGS = ("zero", "uniform", "background")


class Plain:
    """Stores ids of 4 bytes and log-probabilities rounded to bfloat16."""

    def __init__(self, k: int) -> None:
        self.k, self.bytes_per_token = k, k * (4 + 2)

    def encode(self, distribution: SparseDistribution) -> SparseDistribution:
        cut = distribution.top_k(self.k)
        return SparseDistribution(cut.ids, cut.logprobs.bfloat16().float())

    def decode(self, stored: SparseDistribution) -> SparseDistribution:
        return stored


@dataclass(kw_only=True)
class CompressionOptions(TeacherOptions):
    data: Path | None = option(None, "a parquet file with column text")
    tokens: int = option(4096, "measured")
    background_tokens: int = option(4096)
    sequence: int = option(512)
    speed_tokens: int = option(65536)
    repeats: int = option(9)
    device: str = option("cpu")


@torch.inference_mode()
def measure(options: CompressionOptions) -> Json:
    model = load_model(options.teacher, dtype="float32", **options.where).to(options.device)
    vocabulary_size = model.config.vocab_size
    before = -(-options.background_tokens // options.sequence)
    count = before + -(-options.tokens // options.sequence)
    sequences = token_sequences(load_tokenizer(options.teacher, **options.where), options, count)
    teachers = (model(row.to(options.device)).logits[0].float().log_softmax(-1) for row in sequences)

    # By k, the mean mass that rows leave outside their k likeliest tokens.
    totals = {k: torch.zeros(vocabulary_size, device=options.device) for k in (128, 50)}
    for _ in range(before):
        logprobs = next(teachers)
        for k, total in totals.items():
            total += logprobs.scatter(-1, logprobs.topk(k).indices, -torch.inf).exp().sum(0)
    backgrounds = {k: fitted_background(total) for k, total in totals.items()}

    codecs: dict[str, Any] = {
        name: build_codec("logprob_compressor", {"d": vocabulary_size, **each}) for name, each in CONFIGURATIONS.items()
    }
    codecs |= {f"plain_{k}_bfloat16": Plain(k) for k in totals}
    divergences: dict[str, list[torch.Tensor]] = {name: [] for name in codecs}
    samples: list[SparseDistribution] = []
    for logprobs in teachers:
        top = DenseDistribution(logprobs).top_k(128)
        samples.append(top)
        for name, codec in codecs.items():
            stored = codec.decode(codec.encode(top))
            readings = [divergence(logprobs, stored, reading, backgrounds[codec.k]) for reading in READINGS]
            divergences[name].append(torch.stack(readings))
    masses = {k: torch.cat([each.top_k(k).logprobs.exp().sum(-1) for each in samples]) for k in totals}
    return {
        "benchmark": "bytes/token, KL(teacher || stored) in nats, encoding and decoding speed",
        "device": options.device,
        "data": options.data.name if options.data else "pydoc_data.topics",
        "tokens": sum(len(each.ids) for each in samples),
        "background_tokens": before * options.sequence,
        "top_k_mass": {k: mass.mean().item() for k, mass in masses.items()},
        "rows": [
            {"name": name, "bytes_per_token": codec.bytes_per_token}
            | ({} if isinstance(codec, Plain) else {"tokens_per_second": speed(codec, samples, options)})
            | {"kl": summary(torch.cat(divergences[name], -1).double())}
            for name, codec in codecs.items()
        ],
    }


def token_sequences(tokenizer: Any, options: CompressionOptions, count: int) -> list[torch.Tensor]:
    """`count` rows [1, sequence] of consecutive text, documents after one another."""
    needed = options.sequence * count
    ids: list[int] = []
    for text in texts_of(options.data):
        # No more of a long document than is needed: a character is a token at most.
        ids += tokenizer(text[: 8 * needed])["input_ids"]
        if len(ids) >= needed:
            return list(torch.tensor(ids[:needed]).view(count, 1, options.sequence))
    raise SystemExit(f"the text has {len(ids)} tokens, {needed} are needed")


def texts_of(data: Path | None) -> Iterator[str]:
    if data is None:
        yield from (topics[name] for name in sorted(topics))
        return
    for batch in pyarrow.parquet.ParquetFile(data).iter_batches(batch_size=8, columns=["text"]):
        yield from batch.column("text").to_pylist()


def divergence(
    teacher: torch.Tensor, stored: SparseDistribution, reading: str, background: torch.Tensor
) -> torch.Tensor:
    """KL(teacher ‖ stored) of each row."""
    if reading == "zero":
        log_p = teacher.gather(-1, stored.ids).log_softmax(-1)
        log_q = stored.logprobs.log_softmax(-1)
    else:
        shape = background if reading == "background" else torch.zeros_like(background)
        log_p, log_q = teacher, over_vocabulary(replace(stored, background=shape)).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def speed(codec: Codec, samples: list[SparseDistribution], options: CompressionOptions) -> dict[str, int]:
    """Tokens per second of the median repetition."""
    ids = torch.cat([each.ids[:, : codec.k] for each in samples])
    logprobs = torch.cat([each.logprobs[:, : codec.k] for each in samples])
    times = -(-options.speed_tokens // len(ids))
    repeated = SparseDistribution(ids.repeat(times, 1), logprobs.repeat(times, 1))
    stored = codec.encode(repeated)

    def rate(work: Callable[[], object]) -> int:
        return round(len(repeated.ids) / median(seconds_of(work, options.repeats, warm_up=1)))

    return {"encode": rate(lambda: codec.encode(repeated)), "decode": rate(lambda: codec.decode(stored))}


def summary(readings: torch.Tensor) -> Json:
    """Of each reading [readings, tokens] the mean over tokens, and its standard error."""
    return {
        reading: {"mean": each.mean().item(), "standard_error": (each.std() / len(each) ** 0.5).item()}
        for reading, each in zip(READINGS, readings, strict=True)
    }


if __name__ == "__main__":
    options = parse(CompressionOptions)
    save(options, measure(options))
