"""Tokens per second and bytes of cache against the length of the context: the teacher and two students of it.

    python benchmarks/decoding.py --teacher SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/decoding.py --shapes afm-4.5b --dtype bfloat16 --contexts 1024 4096 16384 65536 --output afm.json

`--shapes` needs no file: its teacher has random weights. The students are freshly converted, so what they write is
nonsense, at the speed of trained ones. On CUDA a step is one CUDA graph (`--decoding eager`: without). The models are
measured one after the other, or with `--share` each in a process of its own: all processes that share a file load and
compile side by side, and are alone on the GPU while they are timed. With `--fill` each model writes as many rows at a
time as fill the memory that its weights leave, behind copies of one context. `flatness` is the largest
deviation of a model's decoding from its mean over the contexts; more than 10 % for a student without attention is an
error, raised once the file is written.
"""

import fcntl
import gc
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from distillkit.config import StudentConfig
from distillkit.config.evaluate import SpeedConfig
from distillkit.conversion import build_student
from distillkit.evaluation.generation import decode_as_graphs, decode_greedily, prefill
from distillkit.evaluation.speed import RECORDED_STEPS, cache_bytes, measure_speed
from distillkit.models.loading import load_model
from distillkit.training.precision import cast_for_training
from frame import DEVICE, Json, Options, now, option, parse, save
from steps import SHAPES, random_model

MODELS = ["teacher", "hybrid", "kda_only"]
FLAT = 0.10
"""The largest flatness that a model without attention may have."""
FILLED = 0.85
"""Share of the free memory that `--fill` gives to caches and to what transformers expands of them in a step."""
SPEED = ("contexts", "batch_size", "prefill_tokens", "decode_tokens", "repeats")


@dataclass(kw_only=True)
class DecodingOptions(Options):
    teacher: str | None = option(None, "a folder, a hub id or a .gguf file")
    shapes: Literal["tiny", "smollm2-135m", "afm-4.5b"] | None = option(None, "a random teacher of this shape instead")
    models: list[str] = option(MODELS, choices=MODELS)
    dtype: str = option("float32")
    contexts: list[int] = option([256, 1024, 4096, 8192])
    decoding: Literal["graph", "eager"] = option("graph")
    share: Path | None = option(None, "file through which processes on one GPU wait for each other")
    fill: bool = option(False, "as many rows as fit in the memory of the GPU, instead of --batch_size")
    batch_size: int = option(1)
    prefill_tokens: int = option(8192, "of each row, read at a time")
    decode_tokens: int = option(64)
    repeats: int = option(2)

    def __post_init__(self) -> None:
        if (self.teacher is None) == (self.shapes is None):
            raise ValueError("give one of --teacher and --shapes")
        if self.fill and (self.share is not None or DEVICE.type != "cuda"):
            raise ValueError("--fill needs a GPU to itself: CUDA, and no --share")


def measure(name: str, options: DecodingOptions) -> list[Json]:
    """A row per context; the model's memory is free again afterwards."""
    torch._dynamo.config.automatic_dynamic_shapes = (
        False  # each length has a graph of its own, as in an evaluation of it
    )
    rows = []
    with sharing(options.share) as timed:
        model = model_of(name, options)
        if options.decoding == "graph":
            decode_as_graphs(model)
        settings = SpeedConfig.parse(options.settings(*SPEED))
        for context in settings.contexts:
            start = now()
            if options.fill:
                rows.append(measure_filled(model, settings, context))
            else:
                rows.append(measure_speed(model, settings, context, timed))
            print(f"{name}: {rows[-1]} in {now() - start:.1f} s", flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def measure_filled(model: PreTrainedModel, settings: SpeedConfig, context: int) -> Json:
    """Decoding with the largest batch, whose rows all have the same context: nobody waits for a thousand prefills."""
    ids = torch.randint(model.get_input_embeddings().num_embeddings, (1, context), device=DEVICE)
    logits, cache = prefill(model, ids, settings.prefill_tokens)
    each = sum(cache_bytes(cache).values())
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    keys = max((layer.keys.nbytes for layer in cache.layers if hasattr(layer, "keys")), default=0)
    torch.cuda.empty_cache()
    rows = int(FILLED * torch.cuda.mem_get_info()[0] / (each + 2 * groups * keys))
    cache.batch_repeat_interleave(rows)
    torch.cuda.reset_peak_memory_stats()
    at_most = 1 + RECORDED_STEPS + settings.decode_tokens
    tokens = decode_greedily(model, logits.expand(rows, -1), cache, at_most=at_most)
    deque(islice(tokens, 1 + RECORDED_STEPS), maxlen=0)
    torch.cuda.synchronize()
    start = now()
    deque(tokens, maxlen=0)
    torch.cuda.synchronize()
    rate = rows * settings.decode_tokens / (now() - start)
    return {
        "context": context,
        "rows": rows,
        "decode_tokens_per_second": rate,
        "cache_bytes_per_row": each,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


@contextmanager
def sharing(file: Path | None) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Together with other processes that share the file; gives the context in which this one is alone."""
    if file is None:
        yield nullcontext
        return

    @contextmanager
    def alone() -> Iterator[None]:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
        fcntl.flock(opened, fcntl.LOCK_SH)

    with file.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_SH)
        yield alone


def model_of(name: str, options: DecodingOptions) -> PreTrainedModel:
    """The teacher or a student of it, in the dtypes that it would be loaded in."""
    if options.teacher is not None:
        teacher = load_model(options.teacher, key="teacher", dtype=options.dtype).to(DEVICE)
    else:
        teacher = random_model(SHAPES[str(options.shapes)], getattr(torch, options.dtype), DEVICE).eval()
    if name == "teacher":
        return teacher
    student = build_student(teacher, StudentConfig.parse({"layout": name})).requires_grad_(False)
    cast_for_training(student, teacher.dtype)  # nothing trains: only what stays in float32 is cast
    return student


def flatness(rows: list[Json]) -> float:
    rates = [row["decode_tokens_per_second"] for row in rows]
    mean = sum(rates) / len(rates)
    return max(abs(rate / mean - 1) for rate in rates)


def main() -> None:
    options = parse(DecodingOptions)
    models: Json = {}
    settings = {"teacher": options.shapes or options.teacher, **options.settings("dtype", "decoding", *SPEED)}
    batch = "the largest batch" if options.fill else f"batch {options.batch_size}"
    what = f"decoding and prefill against the length of the context, {batch}"
    for name, rows in measured(options):
        models[name] = {"flatness": flatness(rows), "rows": rows}
        in_order = {name: models[name] for name in options.models if name in models}
        save(options, {"what": what, "settings": settings, "models": in_order}, "flash-linear-attention")
    found = models.get("kda_only", {"flatness": 0})["flatness"]
    if found > FLAT:
        raise SystemExit(f"the decoding of kda_only is not flat: {found:.1%} off its mean")


def measured(options: DecodingOptions) -> Iterator[tuple[str, list[Json]]]:
    """Each model's rows, as soon as they are there."""
    if options.share is None:
        yield from ((name, measure(name, options)) for name in options.models)
        return
    with ProcessPoolExecutor(len(options.models), mp_context=get_context("spawn")) as processes:
        names = {processes.submit(measure, name, options): name for name in options.models}
        yield from ((names[done], done.result()) for done in as_completed(names))


if __name__ == "__main__":
    main()
