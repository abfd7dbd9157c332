"""Do both engines of a capture store the same distributions? The same rows by transformers and by vLLM, on CUDA.

    python benchmarks/capture_engines.py --teacher TEACHER --data TEXT.parquet

captures rows three times, the k likeliest tokens as they are: by transformers in bfloat16, by vLLM in bfloat16, and by
transformers in float32, which shows how much is rounding. Each pair is compared token by token. Of the ids that only
one of the two has, `beyond_the_last` tells by how much the likeliest exceeds the other's k-th log-probability: ties
and rounding keep it small. TEACHER is a folder with safetensors, which both engines read.
"""

import json
import shutil
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import Tensor

from distillkit.capture.run import capture
from distillkit.config.capture import CaptureConfig
from distillkit.models.loading import load_pretrained_config
from frame import Json, Options, in_own_process, option, parse, save, show

ENGINES = {
    "transformers": ("transformers", "bfloat16"),
    "vllm": ("vllm", "bfloat16"),
    "transformers_float32": ("transformers", "float32"),
}
LIKELY = -4.0  # log-probability above which a token matters to a student


@dataclass(kw_only=True)
class EngineOptions(Options):
    teacher: str = option(help="a folder with safetensors, or a hub id")
    data: str = option(help="text to capture")
    documents: int = option(400)
    sequence_length: int = option(2048)
    k: int = option(64)
    vllm: str = option("{}", "further arguments of vllm.LLM, as JSON")
    engines: list[str] = option(list(ENGINES))
    folder: Path = option(Path("runs/benchmark_capture_engines"), "emptied, then used for the captures")

    def __post_init__(self) -> None:
        if unknown := set(self.engines) - set(ENGINES):
            raise ValueError(f"--engines: {', '.join(sorted(unknown))}: there are {', '.join(ENGINES)}")


def main() -> None:
    options = parse(EngineOptions)
    shutil.rmtree(options.folder, ignore_errors=True)
    captures: list[Json] = []
    rows: list[Json] = []
    for name in options.engines:
        captures.append(in_own_process(captured, options, name))
        show(captures[-1])
    for one, other in combinations(options.engines, 2):
        rows.append({"engines": f"{one}, {other}", **compared(*(read(options.folder / name) for name in (one, other)))})
        show(rows[-1])
    settings = options.settings("teacher", "documents", "sequence_length", "k", "vllm")
    content = {"benchmark": "engines of a capture", "settings": settings, "captures": captures, "rows": rows}
    save(options, content, "vllm")


def captured(options: EngineOptions, name: str) -> Json:
    """Capture by one engine."""
    engine, dtype = ENGINES[name]
    more = json.loads(options.vllm) if engine == "vllm" else {}
    vocabulary_size = load_pretrained_config(options.teacher).get_text_config().vocab_size
    config = {
        "teacher": {"path": options.teacher, "kwargs": {"dtype": dtype, **more}},
        "engine": engine,
        "sequence_length": options.sequence_length,
        "dataset": {"train_dataset": {"disk_path": options.data}, "num_samples": options.documents, "seed": 42},
        "compression": {"plain": {"k": options.k, "vocab_size": vocabulary_size, "dtype": "float32"}},
        "output_path": str(options.folder / name),
    }
    summary = capture(CaptureConfig.parse(config))
    rate = round(summary.captured_tokens / summary.seconds)
    return {"engine": name, "dtype": dtype, "tokens": summary.tokens, "tokens_per_second": rate}


def read(folder: Path) -> tuple[list[int], Tensor, Tensor]:
    """All tokens of a capture; ids and log-probabilities of the likeliest after each, [tokens, k]."""
    shards = [pq.read_table(file) for file in sorted(folder.glob("*.parquet"))]
    columns = {
        name: [each for shard in shards for row in shard[name].to_pylist() for each in row]
        for name in ("input_ids", "token_ids", "top_values")
    }
    return columns["input_ids"], torch.tensor(columns["token_ids"]), torch.tensor(columns["top_values"])


def compared(one: tuple[list[int], Tensor, Tensor], other: tuple[list[int], Tensor, Tensor]) -> Json:
    """How far two captures of the same tokens are from each other."""
    (tokens, ids, logprobs), (other_tokens, other_ids, other_logprobs) = one, other
    if tokens != other_tokens:
        raise ValueError("the captures do not hold the same tokens")
    difference, likely, beyond, common = [], [], torch.tensor(0.0), 0
    for part in torch.arange(len(tokens)).split(4096):
        same = ids[part, :, None] == other_ids[part, None, :]  # [tokens, k, k]
        found, place = same.any(-1), same.int().argmax(-1)
        common += int(found.sum())
        values = (logprobs[part] - other_logprobs[part].gather(-1, place)).abs()
        difference.append(values[found])
        likely.append(values[found & (logprobs[part] > LIKELY)])
        for missing, mine, theirs in (
            (~found, logprobs[part], other_logprobs[part]),
            (~same.any(1), other_logprobs[part], logprobs[part]),
        ):
            excess = (mine - theirs[:, -1:])[missing]
            beyond = torch.maximum(beyond, excess.max()) if len(excess) else beyond
    first = ids[:, 0] == other_ids[:, 0]
    gap = (logprobs[:, 0] - logprobs[:, 1])[~first]
    return {
        "tokens": len(tokens),
        "ids_in_common": common / ids.numel(),
        "beyond_the_last": float(beyond),
        "same_likeliest": float(first.float().mean()),
        "gap_where_the_likeliest_differ": float(gap.max()) if len(gap) else 0.0,
        "difference": spread(torch.cat(difference)),
        "difference_of_likely_tokens": spread(torch.cat(likely)),
    }


def spread(values: Tensor) -> dict[str, float]:
    """Of absolute differences, in nats."""
    ordered = values.sort().values
    at = {"median": 0.5, "p99": 0.99, "p99.9": 0.999}
    found = {name: float(ordered[int(share * (len(ordered) - 1))]) for name, share in at.items()}
    return {"mean": float(values.mean()), **found, "max": float(ordered[-1])}


if __name__ == "__main__":
    main()
