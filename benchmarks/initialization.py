"""How should a KDA layer start? KL to the teacher right after conversion, and after equal small training.

    python recipes/quickstart_inputs.py
    python benchmarks/initialization.py            # every variant on the inputs of the quickstart, on the CPU
    python benchmarks/initialization.py --device cuda --teacher … --train … --held-out … \\
        --steps 300 --batch 16 --tokens 2048 --evaluation-tokens 65536

A variant is a student of some `StudentConfig.initialization`. All are trained alike by the product's trainer: the
one-phase recipe, a cosine schedule after a warm-up of an eighth of the steps. Rows of initialization.json without a
variant here are ideas that gave no reason for an option; the script of that file's commit has them.
"""

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from distillkit.config import DatasetSource, StudentConfig
from distillkit.conversion import build_student
from distillkit.data import build_dataset, collate
from distillkit.evaluation.divergence import measure_divergence
from distillkit.models.loading import load_model, load_tokenizer
from distillkit.student.network import KDAHybridForCausalLM
from distillkit.teacher.live import LiveTeacher
from distillkit.training.freezing import freeze
from distillkit.training.precision import cast_for_training
from frame import Json, Options, now, option, run
from steps import FROZEN, arguments_of, one_phase_run, run_config, trainer_of

INPUTS = Path("runs/quickstart/inputs")
DTYPE = torch.bfloat16
VARIANTS: dict[str, Json] = {
    "ours": {},
    "convolution the identity": {"short_convolution": "identity"},
    "convolution as in fla": {"short_convolution": "default"},
    "output scale as in fla": {"output_scale": "default"},
    "memory spread": {"memory": "spread"},
}
"""What each differs in from the defaults of `StudentConfig.initialization`."""


@dataclass(kw_only=True)
class InitializationOptions(Options):
    teacher: str = option(str(next(INPUTS.glob("teacher/*.gguf"), INPUTS / "teacher")))
    train: str = option(str(INPUTS / "train.jsonl"))
    held_out: str = option(str(INPUTS / "valid.jsonl"))
    device: str = option("cpu")
    threads: int = option(1)
    steps: int = option(16)
    batch: int = option(2)
    tokens: int = option(256, "tokens per row")
    seed: int = option(0)
    learning_rate: float = option(1e-3)
    evaluation_tokens: int = option(2048)
    variants: list[str] = option([*VARIANTS], choices=[*VARIANTS], metavar="VARIANT")


def make_student(teacher: PreTrainedModel, variant: str, seed: int) -> KDAHybridForCausalLM:
    """The variant's student, apart from the teacher, with float32 masters of what trains."""
    config = StudentConfig.parse({"seed": seed, "initialization": VARIANTS[variant]})
    student = copy.deepcopy(build_student(teacher, config))
    freeze(student, FROZEN)
    cast_for_training(student, DTYPE)
    return student


def train(
    student: KDAHybridForCausalLM, teacher: PreTrainedModel, rows: Dataset, options: InitializationOptions
) -> list[float]:
    """Train, and return each step's loss."""
    schedule = {"lr_scheduler_type": "cosine", "warmup_steps": max(1, options.steps // 8), "max_grad_norm": 0.5}
    training = {"max_steps": options.steps, "learning_rate": options.learning_rate, "logging_steps": 1, **schedule}
    with tempfile.TemporaryDirectory() as folder:
        run = one_phase_run(options.batch, options.tokens, {**training, "seed": options.seed})
        config = run_config(Path(folder), run)
        trainer = trainer_of(config, arguments_of(config, teacher.device)[0], teacher, student, rows)
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def measure(options: InitializationOptions) -> Iterator[Json]:
    torch.set_num_threads(options.threads)
    teacher, tokenizer = load_model(options.teacher, dtype=DTYPE).to(options.device), load_tokenizer(options.teacher)
    texts = (DatasetSource(disk_path=path) for path in (options.train, options.held_out))
    rows, held_out = (build_dataset(text, tokenizer, options.tokens, seed=0) for text in texts)
    rows = rows.select(range(min(len(rows), options.steps * options.batch)))
    groups = [list(held_out)[start : start + options.batch] for start in range(0, len(held_out), options.batch)]
    batches = [collate(group, pad_token_id=0, sequence_length=options.tokens) for group in groups]
    batches = [{name: tensor.to(options.device) for name, tensor in batch.items()} for batch in batches]
    evaluation = {"num_tokens": options.evaluation_tokens, "student_autocast": DTYPE}
    for name in options.variants:
        student = make_student(teacher, name, options.seed)
        before = measure_divergence(LiveTeacher(teacher), student, batches, **evaluation)
        started = now()
        losses = train(student, teacher, rows, options)
        seconds = now() - started
        after = measure_divergence(LiveTeacher(teacher), student, batches, **evaluation)
        numbers = {"kl_before": before.kl, "agreement_before": before.agreement}
        numbers |= {"kl_after": after.kl, "agreement_after": after.agreement}
        numbers |= {"first_loss": losses[0], "last_loss": losses[-1], "training_seconds": seconds}
        yield {"variant": name, **{key: round(value, 3) for key, value in numbers.items()}}


def settings(options: InitializationOptions, _: list[Json]) -> Json:
    return {"settings": {**options.settings(), "dtype": "bfloat16"}}


if __name__ == "__main__":
    title = "divergence from the teacher by how a KDA layer starts"
    run(InitializationOptions, measure, title, key="results", more=settings)
