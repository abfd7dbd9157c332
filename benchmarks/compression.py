"""What compressed teachers cost and keep: bytes/token, divergence from the teacher, speed of encoding and decoding.

    python benchmarks/compression.py --teacher SmolLM2-135M-Instruct.Q4_1.gguf --data valid.parquet
    python benchmarks/compression.py --teacher FOLDER --tokens 512 --background-tokens 512 --output small.json

Text is column `text` of a parquet file, or the language reference that CPython carries. The teacher runs over it in
sequences. On the first part of the tokens its mass outside the k likeliest is averaged: that is the background. On the
rest, KL(teacher ‖ stored) over the whole vocabulary, in nats, is measured under three readings of what is stored:

    zero         the k stored probabilities normalised, against the teacher's k likeliest normalised alike; what the
                 teacher says of other tokens does not count (it would make the divergence infinite)
    uniform      what the k leave of 1, spread evenly over all other tokens
    background   the same, spread over them as the background is

Where the k leave nothing, as a curve may lie above what it approximates, the others get the resolution of float32 and
the whole is normalised. `plain` is ids of 4 bytes and log-probabilities rounded to bfloat16; nothing is timed there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow.parquet
import torch
from measuring import RESULTS, provenance

from distillkit.compression import Codec, build_codec
from distillkit.distribution import DenseDistribution, SparseDistribution
from distillkit.losses.divergences import over_vocabulary
from distillkit.models.loading import load_model, load_tokenizer
from distillkit.shards import fitted_background

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "recommended": {"k": 128, "exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]},
    "budget": {"k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]},
}
SHARED = {"exact_dtype": "bfloat16", "term_dtype": "float32", "delta_encoding": False}
PLAIN = {"plain_128_bfloat16": 128, "plain_50_bfloat16": 50}
READINGS = ("zero", "uniform", "background")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a .gguf file or a folder")
    parser.add_argument("--data", type=Path, help="a parquet file with column text")
    parser.add_argument("--tokens", type=int, default=4096, help="measured")
    parser.add_argument("--background-tokens", type=int, default=4096)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--speed-tokens", type=int, default=65536)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "compression.json")
    arguments = parser.parse_args()
    with torch.inference_mode():
        result = measure(arguments)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    model = load_model(arguments.teacher, dtype="float32").to(arguments.device)
    tokenizer = load_tokenizer(arguments.teacher)
    before = -(-arguments.background_tokens // arguments.sequence)
    count = before + -(-arguments.tokens // arguments.sequence)
    sequences = token_sequences(tokenizer, arguments.data, arguments.sequence, count)

    def teacher_of(row: torch.Tensor) -> torch.Tensor:
        return model(row.to(arguments.device)).logits[0].float().log_softmax(-1)

    backgrounds = background_of(map(teacher_of, sequences[:before]), model.config.vocab_size, arguments.device)
    codecs = {
        name: build_codec("logprob_compressor", {"d": model.config.vocab_size} | SHARED | each)
        for name, each in CONFIGURATIONS.items()
    }
    divergences: dict[str, dict[str, list[torch.Tensor]]] = {}
    kept: dict[int, list[torch.Tensor]] = {128: [], 50: []}
    samples: list[SparseDistribution] = []
    for row in sequences[before:]:
        teacher = teacher_of(row)
        samples.append(DenseDistribution(teacher).top_k(128))
        for k in kept:
            kept[k].append(samples[-1].top_k(k).logprobs.exp().sum(-1))
        for name, stored in stored_forms(codecs, samples[-1]):
            lists = divergences.setdefault(name, {reading: [] for reading in READINGS})
            for reading in READINGS:
                lists[reading].append(divergence(teacher, stored, reading, backgrounds[stored.ids.shape[-1]]))
    return {
        "benchmark": "bytes/token, KL(teacher || stored) in nats, encoding and decoding speed",
        **provenance(),
        "device": arguments.device,
        "data": arguments.data.name if arguments.data else "pydoc_data.topics",
        "tokens": sum(len(each.ids) for each in samples),
        "background_tokens": before * arguments.sequence,
        "top_k_mass": {k: torch.cat(each).mean().item() for k, each in kept.items()},
        "rows": [
            {"name": name} | cost(codecs.get(name), name, samples, arguments) | {"kl": summary(divergences[name])}
            for name in divergences
        ],
    }


def token_sequences(tokenizer: Any, data: Path | None, length: int, count: int) -> list[torch.Tensor]:
    """`count` rows [1, length] of consecutive text, documents after one another."""
    texts = texts_of(data) if data else iter(topics[name] for name in sorted(topics))
    ids: list[int] = []
    while len(ids) < length * count:
        text = next(texts, None)
        if text is None:
            raise SystemExit(f"the text has {len(ids)} tokens, {length * count} are needed")
        # No more of a long document than is needed: a character is a token at most.
        ids += tokenizer(text[: 8 * length * count])["input_ids"]
    return list(torch.tensor(ids[: length * count]).view(count, 1, length))


def texts_of(data: Path) -> Iterator[str]:
    for batch in pyarrow.parquet.ParquetFile(data).iter_batches(batch_size=8, columns=["text"]):
        yield from batch.column("text").to_pylist()


def background_of(teacher: Iterable[torch.Tensor], vocabulary: int, device: str) -> dict[int, torch.Tensor]:
    """By k, the log of the mean mass that rows leave outside their k likeliest tokens, made to sum to 1."""
    totals = {k: torch.zeros(vocabulary, device=device) for k in (128, 50)}
    for logprobs in teacher:
        for k, total in totals.items():
            total += logprobs.scatter(-1, logprobs.topk(k).indices, -torch.inf).exp().sum(0)
    return {k: fitted_background(total) for k, total in totals.items()}


def stored_forms(codecs: dict[str, Codec], top: SparseDistribution) -> Iterator[tuple[str, SparseDistribution]]:
    for name, codec in codecs.items():
        yield name, codec.decode(codec.encode(top))
    for name, k in PLAIN.items():
        cut = top.top_k(k)
        yield name, SparseDistribution(cut.ids, cut.logprobs.bfloat16().float())


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


def cost(
    codec: Codec | None, name: str, samples: list[SparseDistribution], arguments: argparse.Namespace
) -> dict[str, Any]:
    if codec is None:
        return {"bytes_per_token": PLAIN[name] * (4 + 2)}
    ids = torch.cat([each.ids[:, : codec.k] for each in samples])
    logprobs = torch.cat([each.logprobs[:, : codec.k] for each in samples])
    times = -(-arguments.speed_tokens // len(ids))
    repeated = SparseDistribution(ids.repeat(times, 1), logprobs.repeat(times, 1))
    stored = codec.encode(repeated)
    rates = {
        "encode": tokens_per_second(lambda: codec.encode(repeated), len(repeated.ids), arguments),
        "decode": tokens_per_second(lambda: codec.decode(stored), len(repeated.ids), arguments),
    }
    return {"bytes_per_token": codec.bytes_per_token, "tokens_per_second": rates}


def tokens_per_second(work: Callable[[], object], tokens: int, arguments: argparse.Namespace) -> int:
    """Of the median run, after one that is not counted."""
    seconds = []
    for _ in range(arguments.repeats + 1):
        synchronize(arguments.device)
        started = time.perf_counter()
        work()
        synchronize(arguments.device)
        seconds.append(time.perf_counter() - started)
    return round(tokens / statistics.median(seconds[1:]))


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def summary(divergences: dict[str, list[torch.Tensor]]) -> dict[str, dict[str, float]]:
    """Mean over tokens, and its standard error."""
    rows = {reading: torch.cat(each).double() for reading, each in divergences.items()}
    return {
        reading: {"mean": each.mean().item(), "standard_error": (each.std() / len(each) ** 0.5).item()}
        for reading, each in rows.items()
    }


if __name__ == "__main__":
    main()
