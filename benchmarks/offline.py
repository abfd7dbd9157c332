"""Does a captured teacher teach as the live one does, and how fast are capturing and training?

    python benchmarks/offline.py --teacher TEACHER --data TEXT.parquet

captures as many rows as the steps need with the recommended codec (k 128), converts the teacher to a hybrid student,
and distils it twice, online and from the capture: the same student, rows, order and seed; cross-entropy and KL. The
loss curves are compared, smoothed over ten steps. The live teacher gives the whole distribution, the captured one its
128 likeliest tokens and, with `background`, a stored distribution of the rest.
"""

import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distillkit.capture.run import capture
from distillkit.capture.summary import CaptureSummary
from distillkit.config import DatasetSource, RunConfig, StudentConfig
from distillkit.config.capture import CaptureConfig
from distillkit.conversion import convert
from distillkit.data.sources import load_source
from distillkit.models.loading import load_pretrained_config
from distillkit.training import distill
from frame import DEVICE, Json, TeacherOptions, option, parse, read_metrics, save
from steps import FROZEN

SMOOTHED_OVER = 10
CHARACTERS_PER_TOKEN = 5  # more than English text has, so that there is enough of it
ON_CUDA = DEVICE.type == "cuda"
RECOMMENDED = {"k": 128, "exact_k": 16, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]}
RECOMMENDED |= {"term_dtype": "float32", "delta_encoding": False, "error_diffusion": False}


@dataclass(kw_only=True)
class OfflineOptions(TeacherOptions):
    data: str = option(help="text to train on")
    steps: int = option(200)
    batch: int = option(16)
    sequence_length: int = option(2048)
    handling: Literal["zero", "symmetric_uniform", "background"] = option("background")
    learning_rate: float = option(1e-3)
    seed: int = option(42)
    folder: Path = option(Path("runs/benchmark_offline"), "emptied, then used for everything but the result")

    @property
    def teacher_section(self) -> Json:
        return {"path": self.teacher, "kwargs": {"dtype": "bfloat16" if ON_CUDA else "float32", **self.where}}


def main() -> None:
    options = parse(OfflineOptions)
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    captured = capture_rows(options)
    fidelity = {} if captured.fidelity is None else {"fidelity": vars(captured.fidelity)}
    convert(options.teacher, options.folder / "student", StudentConfig.parse({"layout": "hybrid"}), **options.where)
    lines = {
        "online": train(options, "online", {"kind": "hf", **options.teacher_section}),
        "offline": train(options, "offline", {"kind": "dataset"}, missing_probability_handling=options.handling),
    }
    losses = {
        name: {loss: [line[loss] for line in each] for loss in ("loss", "cross_entropy", "kl")}
        for name, each in lines.items()
    }
    content = {
        "settings": options.settings("steps", "batch", "sequence_length", "handling", "seed"),
        "teacher": Path(options.teacher).name,
        "codec": RECOMMENDED,
        "capture": {
            "tokens": captured.tokens,
            "tokens_per_second": round(captured.captured_tokens / captured.seconds),
            "bytes_per_token_on_disk": round(captured.bytes / captured.tokens, 1),
            **fidelity,
        },
        "training_tokens_per_second": {name: tokens_per_second(each) for name, each in lines.items()},
        "difference_percent": {
            loss: differences(curve, losses["offline"][loss]) for loss, curve in losses["online"].items()
        },
    }
    print(json.dumps(content, indent=2))
    save(options, {**content, "losses": losses}, "flash-linear-attention")


def capture_rows(options: OfflineOptions) -> CaptureSummary:
    """Packed rows for every step."""
    vocabulary_size = load_pretrained_config(options.teacher, **options.where).get_text_config().vocab_size
    text = {"train_dataset": {"disk_path": options.data}, "num_samples": documents_needed(options)}
    config = {
        "teacher": options.teacher_section,
        "sequence_length": options.sequence_length,
        "dataset": {**text, "seed": options.seed},
        "compression": {"logprob_compressor": {"d": vocabulary_size, **RECOMMENDED}},
        "output_path": str(options.folder / "captured"),
    }
    return capture(CaptureConfig.parse(config))


def documents_needed(options: OfflineOptions) -> int:
    """Documents, in the order in which the seed shuffles them, that have the tokens of all steps."""
    texts = load_source(DatasetSource(disk_path=options.data), "--data").shuffle(seed=options.seed)
    characters = CHARACTERS_PER_TOKEN * options.steps * options.batch * options.sequence_length
    for index, row in enumerate(texts):
        characters -= len(row["text"])
        if characters <= 0:
            return index + 1
    return len(texts)


def train(options: OfflineOptions, name: str, teacher: Json, **options_of_kl: str) -> list[Json]:
    """The lines of metrics of one distillation on the captured rows."""
    rows = {"train_dataset": {"disk_path": str(options.folder / "captured")}, "prepacked": True}
    kl = {"function": "kl", "weight": 0.5, "temperature": 1.0, **options_of_kl}
    config = {
        "model": str(options.folder / "student"),
        "teacher": teacher,
        "output_path": str(options.folder / name),
        "sequence_length": options.sequence_length,
        "frozen_res": FROZEN,
        "dataset": {**rows, "seed": options.seed},
        "loss_functions": [{"function": "cross_entropy", "weight": 0.5}, kl],
        "training_args": {
            "max_steps": options.steps,
            "per_device_train_batch_size": options.batch,
            "learning_rate": options.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, options.steps // 20),
            "max_grad_norm": 0.5,
            "bf16": ON_CUDA,
            "logging_steps": 1,
            "save_strategy": "no",
            "seed": options.seed,
        },
    }
    distill(RunConfig.parse(config))
    return read_metrics(options.folder / name)


def tokens_per_second(lines: Sequence[Json]) -> float:
    """The median over the second half of the steps: kernels are compiled in the first."""
    return round(statistics.median(line["tokens_per_second"] for line in lines[len(lines) // 2 :]))


def differences(online: Sequence[float], offline: Sequence[float]) -> dict[str, float]:
    """How far the offline curve is from the online one, in percent of it: mean and maximum, smoothed and per step."""
    smooth = percent_off(smoothed(online), smoothed(offline))
    maximum = max(percent_off(online, offline))
    return {"mean": statistics.mean(smooth), "max": max(smooth), "max_per_step": maximum}


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over ten steps that follow each other; over all if there are fewer."""
    width = min(SMOOTHED_OVER, len(values))
    return [statistics.mean(values[start : start + width]) for start in range(len(values) - width + 1)]


def percent_off(reference: Sequence[float], values: Sequence[float]) -> list[float]:
    return [100 * abs(value - each) / each for each, value in zip(reference, values, strict=True)]


if __name__ == "__main__":
    main()
