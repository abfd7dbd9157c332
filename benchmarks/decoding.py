"""Tokens per second, and what a model remembers, against the length of the context: the teacher and two students of it.

    python benchmarks/decoding.py --teacher SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/decoding.py --teacher … --dtype bfloat16 --contexts 1024 8192 65536 --output decoding_cuda.json

The students are freshly converted: what they write is nonsense, at the speed of trained ones. Each model has a process
of its own, on an accelerator if there is one. `flatness` is the largest deviation of its decoding from its mean over
the contexts; more than 10 % of a student without attention is an error, told once the file is written.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, in_own_process, provenance

from distillkit.config import StudentConfig
from distillkit.config.suites import SpeedConfig
from distillkit.conversion import build_student
from distillkit.evaluation.speed import measure_speed
from distillkit.pretrained import load_model

MODELS = ("teacher", "hybrid", "kda_only")
FLAT = 0.10
"""The most that the flatness of a model without attention may be."""


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model."""
    model = load_model(args.teacher, key="teacher", dtype=args.dtype)
    if args.model != "teacher":
        model = build_student(model, StudentConfig.parse({"layout": args.model}))
    model.to(torch.accelerator.current_accelerator() or torch.device("cpu")).eval()
    settings = SpeedConfig(contexts=args.contexts, decode_tokens=args.decode_tokens, repeats=args.repeats)
    return [measure_speed(model, settings, context) for context in args.contexts]


def flatness(rows: list[dict[str, Any]]) -> float:
    rates = [row["decode_tokens_per_second"] for row in rows]
    mean = sum(rates) / len(rates)
    return max(abs(rate / mean - 1) for rate in rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a folder, a hub id or a .gguf file")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096, 8192])
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", default="decoding.json", help="name of the file in benchmarks/results")
    parser.add_argument("--model", choices=MODELS, help="measure this one alone, and print it")
    args = parser.parse_args()
    if args.model is not None:
        print(json.dumps({"rows": measure(args)}))
        return
    options: list[object] = ["--teacher", args.teacher, "--dtype", args.dtype, "--contexts", *args.contexts]
    options += ["--decode-tokens", args.decode_tokens, "--repeats", args.repeats]
    models = {}
    for name in MODELS:
        rows = in_own_process(__file__, *options, "--model", name)["rows"]
        models[name] = {"flatness": flatness(rows), "rows": rows}
    result = {
        "what": "decoding and prefill against the length of the context, batch 1",
        "settings": {"dtype": args.dtype, "decode_tokens": args.decode_tokens, "repeats": args.repeats},
        **provenance("flash-linear-attention"),
        "models": models,
    }
    (RESULTS / args.output).write_text(json.dumps(result, indent=2) + "\n")
    print(f"{Path('benchmarks/results') / args.output} is written")
    if models["kda_only"]["flatness"] > FLAT:
        raise SystemExit(f"the decoding of kda_only is not flat: {models['kda_only']['flatness']:.1%} off its mean")


if __name__ == "__main__":
    main()
