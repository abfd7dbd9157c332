"""Tokens per second and bytes of cache against the length of the context: the teacher and two students of it.

    python benchmarks/decoding.py --teacher SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/decoding.py --shapes afm-4.5b --dtype bfloat16 --contexts 1024 4096 16384 65536 --output afm.json

`--shapes` needs no file: its teacher has random weights. The students are freshly converted, so what they write is
nonsense, at the speed of trained ones. The models are made and measured one after the other, on an accelerator if there
is one. `flatness` is the largest deviation of a model's decoding from its mean over the contexts; more than 10 % for a
student without attention is an error, raised once the file is written.
"""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from distillkit.config import StudentConfig
from distillkit.config.evaluate import SpeedConfig
from distillkit.conversion import build_student
from distillkit.evaluation.speed import measure_speed
from distillkit.models.loading import load_model
from distillkit.training.precision import cast_for_training
from frame import DEVICE, Json, Options, now, option, parse, save
from steps import SHAPES, random_model

MODELS = ["teacher", "hybrid", "kda_only"]
FLAT = 0.10
"""The largest flatness that a model without attention may have."""
SPEED = ("contexts", "batch_size", "prefill_tokens", "decode_tokens", "repeats")


@dataclass(kw_only=True)
class DecodingOptions(Options):
    teacher: str | None = option(None, "a folder, a hub id or a .gguf file")
    shapes: Literal["tiny", "smollm2-135m", "afm-4.5b"] | None = option(None, "a random teacher of this shape instead")
    models: list[str] = option(MODELS, choices=MODELS)
    dtype: str = option("float32")
    contexts: list[int] = option([256, 1024, 4096, 8192])
    batch_size: int = option(1)
    prefill_tokens: int = option(8192, "of each row, read at a time")
    decode_tokens: int = option(64)
    repeats: int = option(2)

    def __post_init__(self) -> None:
        if (self.teacher is None) == (self.shapes is None):
            raise ValueError("give one of --teacher and --shapes")


def measure(name: str, options: DecodingOptions) -> Iterator[Json]:
    """A row per context; the model's memory is free again afterwards."""
    model = model_of(name, options)
    settings = SpeedConfig.parse(options.settings(*SPEED))
    for context in settings.contexts:
        start = now()
        row = measure_speed(model, settings, context)
        print(f"{name}: {row} in {now() - start:.1f} s", flush=True)
        yield row
    del model
    gc.collect()
    torch.cuda.empty_cache()


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
    settings = {"teacher": options.shapes or options.teacher, **options.settings("dtype", *SPEED)}
    what = f"decoding and prefill against the length of the context, batch {options.batch_size}"
    for name in options.models:
        rows = list(measure(name, options))
        models[name] = {"flatness": flatness(rows), "rows": rows}
        save(options, {"what": what, "settings": settings, "models": models}, "flash-linear-attention")
    found = models.get("kda_only", {"flatness": 0})["flatness"]
    if found > FLAT:
        raise SystemExit(f"the decoding of kda_only is not flat: {found:.1%} off its mean")


if __name__ == "__main__":
    main()
