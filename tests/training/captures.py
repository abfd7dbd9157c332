"""Captured datasets for runs of tiny models, made by `distillkit capture`, and configurations that learn from them."""

import io
import json
from pathlib import Path

from rich.console import Console
from safetensors.torch import load_file

from distillkit.capture.run import capture
from distillkit.config import RunConfig
from distillkit.config.capture import CaptureConfig
from distillkit.training import distill
from tests.training.tiny import BYTES

PLAIN = {"plain": {"k": BYTES, "vocab_size": BYTES}}
COMPRESSED = {
    "logprob_compressor": {
        "d": BYTES, "k": 32, "exact_k": 8, "exact_dtype": "float32", "polynomial_terms": [0, 1, 2, "sqrt"],
        "term_dtype": "float32", "residual_bins": [], "delta_encoding": False, "error_diffusion": False,
        "normalize_t": True,
    }
}  # fmt: skip
ONE_STEP = {
    "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1,
    "per_device_train_batch_size": 64, "logging_steps": 1, "use_cpu": True,
}  # fmt: skip
KL = [{"function": "kl", "weight": 1.0, "missing_probability_handling": "symmetric_uniform"}]


def captured(teacher, text, folder, compression=None, sequence_length=64, packing=True):
    """A captured dataset of several shards, all of the text in it."""
    described = {
        "teacher": {"path": str(teacher)},
        "sequence_length": sequence_length,
        "dataset": {"train_dataset": {"disk_path": str(text)}, "packing": packing},
        "compression": compression or PLAIN,
        "output_path": str(folder),
        "rows_per_shard": 16,
    }
    capture(CaptureConfig.parse(described), None, Console(file=io.StringIO()))
    return str(folder)


def configuration(student, data, folder, teacher=None, training=None, **changes):
    """One step of SGD at learning rate 1 from a captured dataset, unless it is said otherwise."""
    described = {
        "model": student,
        "teacher": teacher or {"kind": "dataset"},
        "output_path": str(folder),
        "sequence_length": 64,
        "dataset": {"train_dataset": {"disk_path": data}, "prepacked": True},
        "loss_functions": KL,
        "training_args": {**ONE_STEP, **(training or {})},
    }
    return RunConfig.parse({**described, **changes})


def run(config):
    """What the run says, off a terminal."""
    said = io.StringIO()
    distill(config, Console(file=said, width=200))
    return said.getvalue()


def first_step(config):
    """The losses of the first step, by name, and the gradients: the untrained weights less those after the step."""
    run(config)
    line = json.loads(Path(config.output_path, "metrics.jsonl").read_text().splitlines()[0])
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (config.model, config.output_path))
    losses = {name: line[name] for name in ("loss", *(loss.function for loss in config.loss_functions))}
    return losses, {name: before[name] - after[name] for name in after}
