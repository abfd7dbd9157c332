"""What benchmarks of single training steps share: shapes, recipes, random rows, and the product's trainer on them."""

import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from distillkit.config import RunConfig
from distillkit.models.varlen_attention import use_varlen_attention
from distillkit.planning.meta_models import read_config, student_config, student_model, teacher_on_meta
from distillkit.training.batches import Collator
from distillkit.training.distiller import Distiller
from distillkit.training.freezing import freeze
from distillkit.training.precision import cast_for_training, compute_dtype
from distillkit.training.trainer import DistillationTrainer
from distillkit.training.wiring import objective_of, online_teacher

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
AFM = {
    **SMOLLM2,
    "architectures": ["ArceeForCausalLM"],
    "model_type": "arcee",
    "hidden_size": 2560,
    "intermediate_size": 18432,
    "num_hidden_layers": 36,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 128005,
    "tie_word_embeddings": False,
    "max_position_embeddings": 65536,
}
TINY = {
    **SMOLLM2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 515,
}
SHAPES = {"tiny": TINY, "smollm2-135m": SMOLLM2, "afm-4.5b": AFM}

FROZEN = ["embed_tokens", "lm_head", r"norm\.weight", r"\.mlp\."]
ONE_PHASE = [
    {"function": "cross_entropy", "weight": 0.2},
    {"function": "kl", "weight": 0.2, "temperature": 2.0},
    {"function": "hs_cosine", "weight": 0.6},
]
ALIGNMENT = [{"function": "attn_mse", "weight": 1.0}]


class StepClock(TrainerCallback):
    """When each step of the optimizer was done."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.moments.append(now())


def now() -> float:
    """Seconds, once the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run_config(folder: Path, run: dict[str, Any]) -> RunConfig:
    """`run` as a whole configuration, of a teacher and text that are taken to be in `folder`."""
    return RunConfig.parse(
        {
            "output_path": str(folder / "run"),
            "teacher": {"kind": "hf", "path": str(folder), "kwargs": {"dtype": "bfloat16"}},
            "student": {"layout": "hybrid"},
            "dataset": {"train_dataset": {"disk_path": str(folder)}},
            **run,
        }
    )


def random_models(
    config: RunConfig, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Teacher and student as the run has them, frozen and cast before they have memory."""
    teacher_config = read_config(config.teacher.path, "teacher.path", {}, False)
    teacher = teacher_on_meta(teacher_config, config.teacher, False)
    student = student_model(config, student_config(config, teacher_config))
    freeze(student, config.frozen_res)
    trained_dtype = torch.bfloat16 if config.trained_weights == "bfloat16" else torch.float32
    cast_for_training(student, dtype, trained_dtype)
    for model in (teacher, student):
        model.to_empty(device=device)
        model.tie_weights()
        for parameter in model.parameters():
            parameter.data.normal_(std=0.02)
        for buffer in model.buffers():
            buffer.fill_(0.1)  # rotary frequencies
        use_varlen_attention(model, dtype)
    return teacher, student


def trainer_of(
    config: RunConfig,
    arguments: TrainingArguments,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    *,
    seed: int = 0,
    callbacks: list[TrainerCallback] | None = None,
) -> DistillationTrainer:
    """The product's trainer for `arguments.max_steps` steps on random tokens, one document per row."""
    vocabulary_size = student.config.vocab_size
    objective = objective_of(config, student, teacher, vocabulary_size)
    number = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.max_steps
    return DistillationTrainer(
        Distiller(student, objective),
        online_teacher(config, teacher, objective, vocabulary_size),
        weights_dtype=compute_dtype(arguments),
        args=arguments,
        train_dataset=_random_rows(number, config.sequence_length, vocabulary_size, seed),
        data_collator=Collator(pad_token_id=0, sequence_length=config.sequence_length),
        callbacks=callbacks,
    )


def _random_rows(number: int, length: int, vocabulary_size: int, seed: int) -> Dataset:
    tokens = torch.randint(vocabulary_size, (number, length), generator=torch.Generator().manual_seed(seed))
    labels = tokens.clone()
    labels[:, 0] = -100  # nothing comes before the first
    return Dataset.from_dict(
        {"input_ids": tokens.tolist(), "labels": labels.tolist(), "seq_lengths": [[length]] * number}
    )
