"""What a model finds again in a long text: RULER's single needles by length and depth.

    python benchmarks/needles.py --model SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/needles.py --model … --haystack prose.parquet --lengths 1024 4096 8192 --output needles_long.json

The haystack of `niah_single_2` is a text of yours, or else the language reference that every CPython carries. The
prompt is plain text, without a chat template.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from measuring import RESULTS, provenance

from distillkit.config.evaluate import NeedlesConfig
from distillkit.evaluation.needles import measure_needles
from distillkit.models.loading import load_model, load_tokenizer


def measure(args: argparse.Namespace, haystack: str) -> dict[str, Any]:
    """By task: its rows, and the seconds that they took."""
    settings = NeedlesConfig.parse(
        {
            "tasks": args.tasks,
            "lengths": args.lengths,
            "depths": args.depths,
            "samples": args.samples,
            "batch_size": args.batch_size,
            "haystack": {"disk_path": haystack},
        }
    )
    model = load_model(args.model, dtype=args.dtype).eval()
    model.to(torch.accelerator.current_accelerator() or torch.device("cpu"))
    tokenizer = load_tokenizer(args.model)
    results = {}
    for task in settings.tasks:
        start = time.perf_counter()
        rows = measure_needles(model, tokenizer, settings, task, progress=lambda done, total: print(done, "/", total))
        results[task] = {"rows": rows, "seconds": round(time.perf_counter() - start)}
        for row in rows:
            print(task, json.dumps(row), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, a hub id or a .gguf file")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tasks", nargs="+", default=["niah_single_1", "niah_single_2"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--depths", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8, help="prompts that are answered together")
    parser.add_argument("--haystack", help="text that is the haystack: a .txt, .jsonl or .parquet file")
    parser.add_argument("--output", default="needles.json", help="name of the file in benchmarks/results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "language_reference.txt"
        reference.write_text("\n\n".join(topics[name] for name in sorted(topics)))
        tasks = measure(args, args.haystack or str(reference))
    names = ("dtype", "lengths", "depths", "samples", "batch_size")
    result = {
        "what": "RULER's needles: sum of scores by length and depth, greedy answers",
        "settings": {
            "model": Path(args.model).name,
            "haystack": Path(args.haystack).name if args.haystack else "Python's language reference",
            **{name: getattr(args, name) for name in names},
        },
        **provenance(),
        "tasks": tasks,
    }
    (RESULTS / args.output).write_text(json.dumps(result, indent=2) + "\n")
    print(f"{Path('benchmarks/results') / args.output} is written")


if __name__ == "__main__":
    main()
