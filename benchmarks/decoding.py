"""Tokens per second, and what a model remembers, against the length of the context: the teacher and two students of it.

    python benchmarks/decoding.py --teacher SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/decoding.py --shapes afm-4.5b --dtype bfloat16 --contexts 1024 4096 16384 65536 \\
        --prefill-tokens 65536 --repeats 1 --output decoding_afm.json
    python benchmarks/decoding.py --shapes tiny --contexts 64 256 --decode-tokens 8 --output small.json

`--shapes` needs no file: its teacher has random weights, made on the device. The students are freshly converted, so
what they write is nonsense, at the speed of trained ones. The models come one after the other, on an accelerator if
there is one, and each is gone before the next is made; the file is written after each. `flatness` is the largest
deviation of a model's decoding from its mean over the contexts; more than 10 % of a student without attention is an
error, told once the file is written.
"""

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, provenance
from steps import SHAPES
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from distillkit.config import StudentConfig
from distillkit.config.evaluate import SpeedConfig
from distillkit.conversion import build_student
from distillkit.evaluation.speed import measure_speed
from distillkit.models.loading import load_model
from distillkit.training.precision import cast_for_training

MODELS = ("teacher", "hybrid", "kda_only")
FLAT = 0.10
"""The most that the flatness of a model without attention may be."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    teacher = parser.add_mutually_exclusive_group(required=True)
    teacher.add_argument("--teacher", help="a folder, a hub id or a .gguf file")
    teacher.add_argument("--shapes", choices=list(SHAPES), help="a teacher of this shape with random weights")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096, 8192])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prefill-tokens", type=int, default=8192, help="of each row, read at a time")
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", default="decoding.json", help="name of the file in benchmarks/results")
    args = parser.parse_args()
    names = ("contexts", "batch_size", "prefill_tokens", "decode_tokens", "repeats")
    settings = {name: vars(args)[name] for name in names}
    result: dict[str, Any] = {
        "what": f"decoding and prefill against the length of the context, batch {args.batch_size}",
        "command": " ".join(["python benchmarks/decoding.py", *sys.argv[1:]]),
        "settings": {"teacher": args.shapes or args.teacher, "dtype": args.dtype, **settings},
        **provenance("flash-linear-attention"),
        "models": {},
    }
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    for name in args.models:
        result["models"][name] = measure(name, args, SpeedConfig.parse(settings), device)
        (RESULTS / args.output).write_text(json.dumps(result, indent=2) + "\n")
    print(f"{Path('benchmarks/results') / args.output} is written")
    flatness = result["models"].get("kda_only", {"flatness": 0})["flatness"]
    if flatness > FLAT:
        raise SystemExit(f"the decoding of kda_only is not flat: {flatness:.1%} off its mean")


def measure(name: str, args: argparse.Namespace, settings: SpeedConfig, device: torch.device) -> dict[str, Any]:
    """What one model does; its memory is free again afterwards."""
    start = time.perf_counter()
    model = model_of(name, args, device)
    print(f"{name}: made in {time.perf_counter() - start:.1f} s", flush=True)
    rows = []
    for context in settings.contexts:
        start = time.perf_counter()
        rows.append(measure_speed(model, settings, context))
        print(f"{name}: {json.dumps(rows[-1])} in {time.perf_counter() - start:.1f} s", flush=True)
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {"flatness": flatness(rows), "rows": rows}


def model_of(name: str, args: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    """The teacher or a student of it, in the dtypes that it would be loaded in."""
    if args.shapes is None:
        teacher = load_model(args.teacher, key="teacher", dtype=args.dtype).to(device)
    else:
        teacher = random_model(SHAPES[args.shapes], getattr(torch, args.dtype), device)
    if name == "teacher":
        return teacher
    student = build_student(teacher, StudentConfig.parse({"layout": name})).requires_grad_(False)
    cast_for_training(student, teacher.dtype)  # nothing trains: only what stays in float32 is cast
    return student


def random_model(shape: dict[str, Any], dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def flatness(rows: list[dict[str, Any]]) -> float:
    rates = [row["decode_tokens_per_second"] for row in rows]
    mean = sum(rates) / len(rates)
    return max(abs(rate / mean - 1) for rate in rates)


if __name__ == "__main__":
    main()
