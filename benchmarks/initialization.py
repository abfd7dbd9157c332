"""How should a KDA layer start? KL to the teacher right after conversion, and after equal small training.

    python recipes/quickstart_inputs.py
    python benchmarks/initialization.py            # every variant on the inputs of the quickstart, on the CPU
    python benchmarks/initialization.py --device cuda --teacher … --train … --held-out … \\
        --steps 300 --batch 16 --tokens 2048 --evaluation-tokens 65536

A variant is a student of some `StudentConfig.initialization`, or changed by a function here: those are ideas that were
tried and gave no reason for an option. All are trained alike by the product's trainer: the one-phase recipe, a cosine
schedule after a warm-up of an eighth of the steps.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from distillkit.config import DatasetSource, StudentConfig
from distillkit.conversion import build_student
from distillkit.conversion.convert import calibrate_layers
from distillkit.data import build_dataset, collate
from distillkit.evaluation.divergence import measure_divergence
from distillkit.models.loading import load_model, load_tokenizer
from distillkit.student.mixers.kda.initialize import set_memory
from distillkit.student.network import KDAHybridForCausalLM, KimiDeltaAttention
from distillkit.teacher.live import LiveTeacher
from distillkit.training.freezing import freeze
from distillkit.training.precision import cast_for_training
from frame import Json, Options, now, option, run
from steps import FROZEN, arguments_of, one_phase_run, run_config, trainer_of

INPUTS = Path("runs/quickstart/inputs")
DTYPE = torch.bfloat16
Change = Callable[[KimiDeltaAttention], None]


def unchanged(kda: KimiDeltaAttention) -> None:
    pass


@dataclass(frozen=True)
class Variant:
    """`options` of the initialisation, and changes of each KDA layer before and after its output is fitted."""

    options: Json = field(default_factory=dict)
    before_fit: Change = unchanged
    after_fit: Change = unchanged


def open_gate(kda: KimiDeltaAttention) -> None:
    """sigmoid(4) = 0.98."""
    nn.init.constant_(kda.g_proj.get_parameter("1.bias"), 4.0)


def decay_of_fla(kda: KimiDeltaAttention) -> None:
    """Each channel at a rate of its own, log-uniformly between 2 and 200 tokens: fla's range under the safe gate."""
    set_memory(kda, 2 * 100 ** torch.rand(kda.dt_bias.shape, generator=torch.Generator().manual_seed(0)))


def one_scale(kda: KimiDeltaAttention) -> None:
    """The fitted scales of a layer's channels, replaced by their mean; the gate half open."""
    bias = kda.g_proj.get_parameter("1.bias")
    kda.o_norm.weight.data.mul_(2 * bias.sigmoid().mean())
    nn.init.zeros_(bias)


def scale_in_projection(kda: KimiDeltaAttention) -> None:
    """The fitted scales in the columns of o_proj, and norm and gate as in fla."""
    bias = kda.g_proj.get_parameter("1.bias")
    kda.o_proj.weight.data.mul_(2 * bias.sigmoid() * kda.o_norm.weight.repeat(kda.num_heads))
    nn.init.zeros_(bias)
    nn.init.ones_(kda.o_norm.weight)


VARIANTS = {
    "ours": Variant(),
    "convolution the identity": Variant({"short_convolution": "identity"}),
    "convolution as in fla": Variant({"short_convolution": "default"}),
    "output scale as in fla": Variant({"output_scale": "default"}),
    "memory spread": Variant({"memory": "spread"}),
    "decay as in fla": Variant(before_fit=decay_of_fla),
    "all as in fla": Variant({"short_convolution": "default", "output_scale": "default"}, before_fit=decay_of_fla),
    "output scale as in fla, gate open": Variant({"output_scale": "default"}, before_fit=open_gate),
    "one output scale per layer": Variant(after_fit=one_scale),
    "output scale in o_proj": Variant(after_fit=scale_in_projection),
}


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


def make_student(teacher: PreTrainedModel, variant: Variant, seed: int) -> KDAHybridForCausalLM:
    """The variant's student, apart from the teacher, with float32 masters of what trains."""
    options = {"output_scale": "fitted", **variant.options}
    unfitted = StudentConfig.parse({"seed": seed, "initialization": {**options, "output_scale": "default"}})
    student = copy.deepcopy(build_student(teacher, unfitted))
    layers = [module for module in student.modules() if isinstance(module, KimiDeltaAttention)]
    for kda in layers:
        variant.before_fit(kda)
    if options["output_scale"] == "fitted":
        calibrate_layers(teacher, student, torch.Generator().manual_seed(seed))
    for kda in layers:
        variant.after_fit(kda)
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
        student = make_student(teacher, VARIANTS[name], options.seed)
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
