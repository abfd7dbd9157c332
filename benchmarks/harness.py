"""The same scores through `distillkit evaluate` as through lm-eval's own command, on a real teacher and without a hub.

    python benchmarks/harness.py --model SmolLM2-135M-Instruct.Q4_1.gguf

The tasks are those of tests/evaluation/tasks: forty facts to choose from, forty sums to write. Both sides load the
same folder, to which the model is saved first.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import RESULTS, provenance

from distillkit.config.evaluate import EvaluateConfig
from distillkit.evaluation import evaluate
from distillkit.models.loading import load_model, load_tokenizer

TASKS = Path(__file__).parent.parent / "tests" / "evaluation" / "tasks"
NAMES = ("distillkit_facts", "distillkit_sums")


def save(model: str, folder: Path) -> None:
    """As a folder that lm-eval can load; of a GGUF file, its dequantised weights."""
    loaded = load_model(model, dtype="float32")
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    loaded.save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)


def by_evaluate(model: Path, folder: Path) -> dict[str, Any]:
    config = {
        "output_path": str(folder),
        "teacher": {"path": str(model)},
        "benchmarks": {"tasks": list(NAMES), "include_path": [str(TASKS)]},
    }
    scores = evaluate(EvaluateConfig.parse(config))["benchmarks"]["teacher"]
    return {
        f"{task} {metric}": [score["value"], score["standard_error"]]
        for task, found in scores.items()
        for metric, score in found["metrics"].items()
    }


def by_command(model: Path, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model}"]
    command += ["--tasks", ",".join(NAMES), "--include_path", str(TASKS), "--output_path", str(folder)]
    command += ["--batch_size", "8", "--seed", "1234"]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    (written,) = folder.rglob("results_*.json")
    rows = json.loads(written.read_text())["results"]
    scores = {}
    for task, row in rows.items():
        for key, value in row.items():
            metric, separator, filtered = key.partition(",")
            if separator and not metric.endswith("_stderr"):
                scores[f"{task} {key.removesuffix(',none')}"] = [value, row[f"{metric}_stderr,{filtered}"]]
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, a hub id or a .gguf file")
    parser.add_argument("--output", default="harness.json", help="name of the file in benchmarks/results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save(args.model, model)
        ours, theirs = by_evaluate(model, Path(folder) / "ours"), by_command(model, Path(folder) / "theirs")
    result = {
        "what": "scores and standard errors through distillkit evaluate and through lm_eval run, 40 samples each",
        "model": Path(args.model).name,
        **provenance("lm_eval"),
        "equal": ours == theirs,
        "evaluate": ours,
        "lm_eval": theirs,
    }
    (RESULTS / args.output).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    if ours != theirs:
        raise SystemExit("the scores differ")


if __name__ == "__main__":
    main()
