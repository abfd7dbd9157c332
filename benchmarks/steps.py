"""Single training steps: shapes of models, recipes, random weights and rows, and the product's trainer on them."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainerCallback, TrainingArguments

from distillkit.config import RunConfig
from distillkit.data.signals import TensorRows
from distillkit.models.divided_rows import Context
from distillkit.models.float8 import exchange, frozen_in_float8
from distillkit.models.varlen_attention import use_varlen_attention
from distillkit.planning.meta_models import read_config, student_config, student_model, teacher_on_meta
from distillkit.teacher.live import LiveTeacher
from distillkit.training.arguments import build_training_arguments
from distillkit.training.batches import Collator
from distillkit.training.compilation import compiled_step
from distillkit.training.distiller import Distiller
from distillkit.training.freezing import freeze
from distillkit.training.precision import cast_for_training, compute_dtype
from distillkit.training.setup import checkpoint_layers
from distillkit.training.trainer import DistillationTrainer
from distillkit.training.wiring import objective_of, signal_request
from frame import Json, now, start_peak

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZES += ("head_dim", "vocab_size")


def llama(*sizes: int, **changes: Any) -> Json:
    """The config.json of a Llama with these `SIZES`."""
    common = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
    common |= {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16"}
    return {**common, **dict(zip(SIZES, sizes, strict=True)), **changes}


ARCEE = {"architectures": ["ArceeForCausalLM"], "model_type": "arcee", "tie_word_embeddings": False}
SMOLLM2 = llama(576, 1536, 30, 9, 3, 64, 49152)
AFM = llama(2560, 18432, 36, 20, 4, 128, 128005, max_position_embeddings=65536, **ARCEE)
QWEN = llama(5120, 17408, 40, 40, 8, 128, 151936, max_position_embeddings=40960)
QWEN |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": False}
SHAPES = {"tiny": llama(64, 128, 4, 2, 1, 32, 515), "smollm2-135m": SMOLLM2, "afm-4.5b": AFM, "qwen3-14b": QWEN}

FROZEN = ["embed_tokens", "lm_head", r"norm\.weight", r"\.mlp\."]
KL = [{"function": "kl", "weight": 1.0}]
ALIGNMENT = [{"function": "attn_mse", "weight": 1.0}]
ONE_PHASE = [
    {"function": "cross_entropy", "weight": 0.2},
    {"function": "kl", "weight": 0.2, "temperature": 2.0},
    {"function": "hs_cosine", "weight": 0.6},
]


class StepClock(TrainerCallback):
    """When each optimizer step was done."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.moments.append(now())

    def seconds(self, first: int, last: int | None = None) -> list[float]:
        """Of each step from `first` (at least 1, counted from 0) to before `last`."""
        moments = self.moments[first - 1 : last]
        return [later - earlier for earlier, later in zip(moments, moments[1:], strict=False)]


def one_phase_run(batch: int, sequence_length: int, arguments: Json | None = None, **changes: Any) -> Json:
    """The YAML of steps of the one-phase recipe, without paths; `arguments` are more training_args."""
    training = {"per_device_train_batch_size": batch, "bf16": True, "learning_rate": 1e-6, **(arguments or {})}
    run = {"sequence_length": sequence_length, "loss_functions": ONE_PHASE, "layer_mapping": "all"}
    return {**run, "frozen_res": FROZEN, **changes, "training_args": training}


def run_config(folder: Path, run: Json, shape: Json | None = None) -> RunConfig:
    """`run` as a whole configuration, with teacher and text in `folder`; `shape` is written there as the teacher's."""
    if shape is not None:
        (folder / "config.json").write_text(json.dumps(shape))
    teacher = {"kind": "hf", "path": str(folder), "kwargs": {"dtype": "bfloat16"}, **run.get("teacher", {})}
    text = {"train_dataset": {"disk_path": str(folder)}}
    whole = {"output_path": str(folder / "run"), "teacher": teacher, "student": {"layout": "hybrid"}, "dataset": text}
    return RunConfig.parse({**whole, **run, "teacher": teacher})


def take_steps(
    config: RunConfig, device: torch.device, *, seed: int = 0, clock: StepClock | None = None
) -> DistillationTrainer:
    """`training_args.max_steps` steps of a run with random weights and tokens, one document per row.

    The peak of memory is that of the steps, weights included.
    """
    given = {**config.training_args, "use_cpu": device.type == "cpu"}
    arguments, techniques = build_training_arguments(given, Path(config.output_path), uses_logits=True)
    torch.manual_seed(seed)
    teacher, student = random_models(config, compute_dtype(arguments), device)
    if techniques.gradient_checkpointing:
        checkpoint_layers(student, dict(techniques.gradient_checkpointing_kwargs))
    number = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.max_steps
    rows = random_rows(number, config.sequence_length, student.config.vocab_size, seed)
    live = LiveTeacher(teacher)
    distiller = Distiller(student, objective_of(config, student, live, student.config.vocab_size))
    trainer = trainer_of(config, arguments, live, distiller, rows, [clock] if clock else [])
    start_peak(device)
    frozen = nullcontext() if config.frozen_precision is None else frozen_in_float8(student)
    with frozen, compiled_step(student, teacher, trainer.model.objective, techniques.compilation):
        trainer.train()
    return trainer


def random_models(
    config: RunConfig, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Teacher and student as the run has them, frozen and cast before they take memory."""
    teacher_config = read_config(config.teacher.path, "teacher.path", {}, False)
    teacher = teacher_on_meta(teacher_config, config.teacher, False)
    student = student_model(config, student_config(config, teacher_config))
    freeze(student, config.frozen_res)
    cast_for_training(student, dtype, torch.bfloat16 if config.trained_weights == "bfloat16" else torch.float32)
    for model in (teacher, student):
        model.to_empty(device=device)
        model.tie_weights()
        for parameter in model.parameters():
            parameter.data.normal_(std=0.02)
        for buffer in model.buffers():
            buffer.fill_(0.1)  # rotary frequencies
        use_varlen_attention(model, dtype)
    if config.teacher.kind == "hf" and config.teacher.quantization == "float8":
        exchange(teacher, "teacher.quantization")
    return teacher, student


def random_model(shape: Json, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A causal language model of a shape, as transformers initialises it."""
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=dtype)


def random_rows(number: int, length: int, vocabulary_size: int, seed: int) -> Dataset:
    tokens = torch.randint(vocabulary_size, (number, length), generator=torch.Generator().manual_seed(seed))
    labels = tokens.clone()
    labels[:, 0] = -100  # nothing comes before the first
    columns = {"input_ids": tokens.tolist(), "labels": labels.tolist(), "seq_lengths": [[length]] * number}
    return Dataset.from_dict(columns)


def trainer_of(
    config: RunConfig,
    arguments: TrainingArguments,
    teacher: LiveTeacher,
    distiller: Distiller,
    rows: Dataset,
    callbacks: list[TrainerCallback],
    context: Context | None = None,
) -> DistillationTrainer:
    """The product's trainer, for a student that is frozen and cast."""
    assert config.teacher.kind == "hf"
    vocabulary_size = distiller.student.config.vocab_size
    return DistillationTrainer(
        distiller,
        teacher,
        signal_request(distiller.objective, top_k=config.teacher.top_k, vocabulary_size=vocabulary_size),
        weights_dtype=compute_dtype(arguments),
        args=arguments,
        train_dataset=TensorRows(rows),
        data_collator=Collator(pad_token_id=0, sequence_length=config.sequence_length),
        callbacks=callbacks,
        context=context,
    )
