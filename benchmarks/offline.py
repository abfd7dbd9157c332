"""Does a captured teacher teach as the live one does, how fast is it captured, and how fast is it learnt from?

    python benchmarks/offline.py --teacher TEACHER --data TEXT.parquet

captures so many rows as the steps need with the recommended codec (k 128), converts the teacher to a hybrid student,
and distils it twice, online and from the capture: the same student, rows, order and seed; cross-entropy and KL. The
loss curves are compared, smoothed over ten steps. The live teacher says the whole distribution, the captured one its
128 likeliest tokens and, with `background`, a stored distribution of the rest.
"""

import argparse
import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, provenance

from distillkit.capture.run import capture
from distillkit.capture.summary import CaptureSummary
from distillkit.config import DatasetSource, RunConfig, StudentConfig
from distillkit.config.capture import CaptureConfig
from distillkit.conversion import convert
from distillkit.data.sources import load_source
from distillkit.models.loading import load_pretrained_config
from distillkit.training import distill

SMOOTHED_OVER = 10
CHARACTERS_PER_TOKEN = 5  # more than English text has, so that there is enough of it
FROZEN = ["embed_tokens", "lm_head", r"norm\.weight", r"^model\.layers\.[0-9]+\.mlp\..*"]
RECOMMENDED = {
    "k": 128,
    "exact_k": 16,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
    "term_dtype": "float32",
    "delta_encoding": False,
    "error_diffusion": False,
}


def main() -> None:
    options = parse()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    captured = capture_rows(options)
    student = options.folder / "student"
    where = {} if options.gguf_file is None else {"gguf_file": options.gguf_file}
    convert(options.teacher, student, StudentConfig.parse({"layout": "hybrid"}), **where)
    online = train(
        options, student, "online", {"kind": "hf", "path": options.teacher, "kwargs": teacher_kwargs(options)}
    )
    offline = train(options, student, "offline", {"kind": "dataset"})
    result = {
        "settings": {
            name: getattr(options, name) for name in ("steps", "batch", "sequence_length", "handling", "seed")
        },
        "teacher": Path(options.teacher).name,
        "codec": RECOMMENDED,
        "capture": capture_numbers(captured),
        "training_tokens_per_second": {"online": tokens_per_second(online), "offline": tokens_per_second(offline)},
        "difference_percent": differences(curve(online), curve(offline)),
        "losses": {"online": curve(online), "offline": curve(offline)},
        **provenance("flash-linear-attention"),
    }
    print(json.dumps({name: value for name, value in result.items() if name != "losses"}, indent=2))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a folder, a hub id or a .gguf file")
    parser.add_argument("--gguf-file", help="name of the GGUF file in the teacher's folder")
    parser.add_argument("--data", required=True, help="text to train on")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--handling", default="background", choices=["zero", "symmetric_uniform", "background"])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_offline"), help="emptied, then worked in")
    parser.add_argument("--out", type=Path, default=RESULTS / "offline.json")
    return parser.parse_args()


def teacher_kwargs(options: argparse.Namespace) -> dict[str, Any]:
    where = {} if options.gguf_file is None else {"gguf_file": options.gguf_file}
    return {"dtype": "bfloat16" if torch.cuda.is_available() else "float32", **where}


def capture_rows(options: argparse.Namespace) -> CaptureSummary:
    """Packed rows for every step."""
    where = {} if options.gguf_file is None else {"gguf_file": options.gguf_file}
    vocabulary_size = load_pretrained_config(options.teacher, **where).get_text_config().vocab_size
    config = {
        "teacher": {"path": options.teacher, "kwargs": teacher_kwargs(options)},
        "sequence_length": options.sequence_length,
        "dataset": {
            "train_dataset": {"disk_path": options.data},
            "seed": options.seed,
            "num_samples": rows_needed(options),
        },
        "compression": {"logprob_compressor": {"d": vocabulary_size, **RECOMMENDED}},
        "output_path": str(options.folder / "captured"),
    }
    return capture(CaptureConfig.parse(config))


def rows_needed(options: argparse.Namespace) -> int:
    """Rows of the text, in the order in which the seed shuffles them, that have the tokens of all steps."""
    texts = load_source(DatasetSource(disk_path=options.data), "--data").shuffle(seed=options.seed)
    characters = CHARACTERS_PER_TOKEN * options.steps * options.batch * options.sequence_length
    for index, row in enumerate(texts):
        characters -= len(row["text"])
        if characters <= 0:
            return index + 1
    return len(texts)


def train(options: argparse.Namespace, student: Path, name: str, teacher: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of metrics of one distillation on the captured rows."""
    handling = {"missing_probability_handling": options.handling} if teacher["kind"] == "dataset" else {}
    path = options.folder / name
    config = {
        "model": str(student),
        "teacher": teacher,
        "output_path": str(path),
        "sequence_length": options.sequence_length,
        "frozen_res": FROZEN,
        "dataset": {
            "train_dataset": {"disk_path": str(options.folder / "captured")},
            "prepacked": True,
            "seed": options.seed,
        },
        "loss_functions": [
            {"function": "cross_entropy", "weight": 0.5},
            {"function": "kl", "weight": 0.5, "temperature": 1.0, **handling},
        ],
        "training_args": {
            "max_steps": options.steps,
            "per_device_train_batch_size": options.batch,
            "learning_rate": options.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, options.steps // 20),
            "max_grad_norm": 0.5,
            "bf16": torch.cuda.is_available(),
            "logging_steps": 1,
            "save_strategy": "no",
            "seed": options.seed,
        },
    }
    distill(RunConfig.parse(config))
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def curve(lines: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    return {name: [line[name] for line in lines] for name in ("loss", "cross_entropy", "kl")}


def capture_numbers(summary: CaptureSummary) -> dict[str, Any]:
    fidelity = summary.fidelity
    return {
        "tokens": summary.tokens,
        "tokens_per_second": round(summary.captured_tokens / summary.seconds),
        "bytes_per_token_on_disk": round(summary.bytes / summary.tokens, 1),
        **({} if fidelity is None else {"fidelity": vars(fidelity)}),
    }


def tokens_per_second(lines: Sequence[dict[str, Any]]) -> float:
    """The median over the second half of the steps: kernels are compiled in the first."""
    return round(statistics.median(line["tokens_per_second"] for line in lines[len(lines) // 2 :]))


def differences(online: dict[str, list[float]], offline: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """How far the offline curve is from the online one, in percent of it: mean and maximum, smoothed and per step."""
    found = {}
    for name in online:
        raw = _percent(online[name], offline[name])
        smooth = _percent(smoothed(online[name]), smoothed(offline[name]))
        found[name] = {"mean": statistics.mean(smooth), "max": max(smooth), "max_per_step": max(raw)}
    return found


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over ten steps that follow each other; over all where there are fewer."""
    width = min(SMOOTHED_OVER, len(values))
    return [statistics.mean(values[start : start + width]) for start in range(len(values) - width + 1)]


def _percent(reference: Sequence[float], values: Sequence[float]) -> list[float]:
    return [100 * abs(value - each) / each for each, value in zip(reference, values, strict=True)]


if __name__ == "__main__":
    main()
