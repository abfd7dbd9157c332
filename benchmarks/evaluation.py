"""Is a teacher itself, and is a trained student nearer to it than an untrained one?

    python benchmarks/evaluation.py --teacher TEACHER --data TEXT.parquet --student distilled=runs/smollm2/hybrid

measures by `distillkit evaluate` the teacher against itself (KL 0, agreement 1, the same scores), against its untrained
conversion to a hybrid, and against the students that are named, on held-out text and on the tasks that are named. It
says whether the order is right, and fails where it is not.
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, provenance

from distillkit.config import StudentConfig
from distillkit.config.evaluate import EvaluateConfig
from distillkit.config.evaluate_options import check_evaluate_ready
from distillkit.conversion import convert
from distillkit.evaluation import evaluate

ITSELF, UNTRAINED = "itself", "untrained"


def main() -> None:
    options = parse()
    untrained = options.folder / UNTRAINED
    where = {} if options.gguf_file is None else {"gguf_file": options.gguf_file}
    if not untrained.exists():
        convert(options.teacher, untrained, StudentConfig.parse({"layout": "hybrid"}), **where)
    config = described(options, untrained, where)
    check_evaluate_ready(config)
    results = evaluate(config)
    if results["failures"]:
        raise SystemExit("something could not be measured")
    trimmed = {
        "settings": {"tokens": options.num_tokens, "sequence_length": options.sequence_length, "limit": options.limit},
        "teacher": Path(options.teacher).name,
        "models": {name: without(model, "path") for name, model in results["models"].items()},
        "divergence": results["divergence"],
        "benchmarks": results["benchmarks"],
        "checks": checks(results),
        **provenance("lm_eval", "flash-linear-attention"),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(trimmed, indent=1) + "\n")
    print(json.dumps(trimmed["checks"], indent=1))
    if not all(trimmed["checks"].values()):
        raise SystemExit("the numbers are not as they must be")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a folder, a hub id or a .gguf file")
    parser.add_argument("--gguf-file", help="name of the GGUF file in the teacher's folder")
    parser.add_argument("--data", required=True, help="held-out text")
    parser.add_argument(
        "--student", action="append", required=True, metavar="NAME=PATH", help="one or more, the better trained later"
    )
    parser.add_argument("--task", action="append", default=[], help="a task of lm-eval")
    parser.add_argument("--include-path", action="append", default=[], help="a folder with tasks of your own")
    parser.add_argument("--limit", type=int, help="samples of each task, and rows of text")
    parser.add_argument("--num-tokens", type=int, default=98_304)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_evaluation"), help="goes on where it was")
    parser.add_argument("--out", type=Path, default=RESULTS / "evaluation.json")
    return parser.parse_args()


def described(options: argparse.Namespace, untrained: Path, where: dict[str, str]) -> EvaluateConfig:
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    teacher = {"path": options.teacher, "kwargs": {"dtype": dtype, **where}}
    students = {ITSELF: teacher, UNTRAINED: {"path": str(untrained), "kwargs": {"dtype": dtype}}}
    for text in options.student:
        name, _, path = text.partition("=")
        students[name] = {"path": path, "kwargs": {"dtype": dtype}}
    config: dict[str, Any] = {
        "output_path": str(options.folder / "evaluation"),
        "teacher": teacher,
        "students": students,
        "limit": options.limit,
        "divergence": {
            "dataset": {"disk_path": options.data},
            "num_tokens": options.num_tokens,
            "sequence_length": options.sequence_length,
        },
    }
    if options.task:
        config["benchmarks"] = {"tasks": options.task, "include_path": options.include_path}
    return EvaluateConfig.parse(config)


def checks(results: dict[str, Any]) -> dict[str, bool]:
    """What must be so of what was measured: each student is nearer than the one that was named before it."""
    measured = results["divergence"]
    order = [measured[name] for name in measured if name != ITSELF]
    found = {
        "the teacher does not diverge from itself": measured[ITSELF]["kl"] == 0 and measured[ITSELF]["agreement"] == 1,
        "each student is nearer than the one before": all(
            after["kl"] < before["kl"] and after["agreement"] > before["agreement"] for before, after in pairwise(order)
        ),
    }
    if scores := results["benchmarks"]:
        found["the teacher's scores are its own"] = scores["teacher"] == scores[ITSELF]
    return found


def without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


if __name__ == "__main__":
    main()
