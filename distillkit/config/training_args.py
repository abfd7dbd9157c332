"""`training_args`: the arguments of transformers' Trainer, checked by name, type and choice."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from distillkit.config.errors import KeyProblem, did_you_mean, one_of, shown
from distillkit.config.parallel import DIVIDED
from distillkit.config.transformers_arguments import Argument, find_argument, known_arguments

RENAMED = {
    "warmup_ratio": "warmup_steps",  # a number below 1 is a share of the steps
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
"""Other names of transformers for the same argument, most of them older."""

WITHOUT_EFFECT = (
    "remove_unused_columns",
    "save_safetensors",
    "overwrite_output_dir",
    "logging_dir",
    "include_tokens_per_second",
    "hub_strategy",
    "hub_always_push",
)
"""Arguments of published configurations that change nothing here: batches contain what the losses need, weights are
always saved as safetensors, only the finished student is uploaded to the hub, and so on."""

SET_BY_THE_RUN = {
    "output_dir": "use the top-level key output_path",
    "max_length": "use the top-level key sequence_length",
    "max_seq_length": "use the top-level key sequence_length",
    "resume_from_checkpoint": "use the top-level key resume: true, or --resume",
    "project": "use the top-level key project_name",
    "label_names": "the batches contain what the losses need; remove it",
    "label_smoothing_factor": "the losses are those of loss_functions; remove it",
    "load_best_model_at_end": "the student of the last step is saved; remove it",
    "enable_jit_checkpoint": "a run that is stopped saves a checkpoint anyway; remove it",
    "use_liger_kernel": "its fused losses would replace those of loss_functions; remove it",
    "neftune_noise_alpha": "noisy embeddings would not match the teacher's; remove it",
    "average_tokens_across_devices": "the run always averages over all devices; remove it",
    "fp16": "gradients of single tokens are too small for float16; use bf16: true",
    "fsdp": f"FSDP is a section of its own here; write {DIVIDED} at the top level instead",
    "fsdp_config": f"FSDP is a section of its own here; write {DIVIDED} at the top level instead",
    "parallelism_config": f"models are divided by a section of their own; write {DIVIDED} at the top level instead",
    "deepspeed": f"DeepSpeed is not supported, FSDP2 does the same; write {DIVIDED} at the top level instead",
    "hub_token": "set HF_TOKEN in the environment, or log in with `hf auth login`; run.json keeps the configuration",
    "do_train": "the run always trains; remove it",
    "do_predict": "the run does not predict; remove it",
}
"""Arguments that are refused unless they are switched off, and what to do instead."""

QUANTIZED_OPTIMIZERS = ("adamw_torch_8bit", "adamw_torch_4bit")
"""Values of `optim` that keep blocks of numbers together: torchao's."""

STOCHASTIC_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", *QUANTIZED_OPTIMIZERS)
"""Values of `optim` that round stochastically, so that bfloat16 weights do not lose small updates."""

SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", *QUANTIZED_OPTIMIZERS, "sgd", "rmsprop", "adagrad")
"""Values of `optim` that take parameters divided over processes."""

POSITIVE = (
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "torch_empty_cache_steps",
    "logging_steps",
    "save_steps",
    "eval_steps",
    "eval_accumulation_steps",
    "dataloader_prefetch_factor",
    "ddp_bucket_cap_mb",
    "ddp_timeout",
)
NOT_NEGATIVE = (
    "learning_rate",
    "weight_decay",
    "warmup_ratio",
    "warmup_steps",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "eval_delay",
    "dataloader_num_workers",
    "seed",
    "data_seed",
)
BELOW = {"warmup_ratio": 1, "adam_beta1": 1, "adam_beta2": 1, "seed": 2**32, "data_seed": 2**32}

_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
CHOICES: dict[str, tuple[str, ...]] = {
    "log_level": _LEVELS,
    "log_level_replica": _LEVELS,
    "save_strategy": ("no", "steps", "epoch"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
    "dataloader_multiprocessing_context": ("fork", "forkserver", "spawn"),
    "ddp_backend": ("nccl", "mpi", "xccl", "hccl", "gloo", "cncl", "mccl"),
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
}
"""Choices that transformers' annotations do not have, or has more of than a run can do (`save_strategy: best`)."""

MEANT = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "num_steps": "max_steps",
    "max_train_steps": "max_steps",
    "warmup": "warmup_steps",
    "num_warmup_steps": "warmup_steps",
    "scheduler": "lr_scheduler_type",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "grad_accum": "gradient_accumulation_steps",
    "accumulation_steps": "gradient_accumulation_steps",
    "clip_grad_norm": "max_grad_norm",
    "gradient_clipping": "max_grad_norm",
    "wandb": "report_to",
}
"""What other programs call an argument, and its name here."""

_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "text"),
    "list": ((list,), "a list"),
    "dict": ((dict,), "a mapping"),
    "None": ((type(None),), "empty"),
}


def argument_named(name: str) -> str | None:
    """The argument that a name stands for: its own, an older one, or one of another program's; None for others."""
    return name if name in known_arguments() or name in RENAMED else MEANT.get(name)


def takes_null(name: str) -> bool:
    """Whether null is a value of an argument, such as `save_total_limit`; for others it means that none is given."""
    argument = find_argument(name)
    return argument is not None and "None" in argument.types


def check_training_args(given: Mapping[str, Any], keys_of_the_run: Iterable[str] = ()) -> dict[str, Any]:
    """The arguments under their present names in transformers, without those that have no effect.

    keys_of_the_run: keys of the top level; the error for one of them here names its place.

    Raises `KeyProblem` for an unknown or refused name, and for a value of the wrong type.
    """
    checked: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name, value in given.items():
        if name in WITHOUT_EFFECT or (name in SET_BY_THE_RUN and not value):
            continue
        if name in SET_BY_THE_RUN:
            raise KeyProblem(name, SET_BY_THE_RUN[name])
        current = RENAMED.get(name, name)
        argument = find_argument(str(current))
        if argument is None:
            raise KeyProblem(str(name), f"unknown key{_instead_of(str(name), keys_of_the_run)}")
        if current in names:
            raise KeyProblem(name, f"is the same as {names[current]}; keep one of the two")
        names[current] = name
        if current.endswith("_strategy") and value is False:
            value = "no"  # YAML reads a bare `no` as false
        _check_value(name, value, argument)
        checked[current] = value
    return checked


def _instead_of(name: str, keys_of_the_run: Iterable[str]) -> str:
    if name in MEANT:
        return f"; did you mean {MEANT[name]!r}?"
    if name in keys_of_the_run:
        return f"; {name} is a key of the top level"
    return did_you_mean(name, [*known_arguments(), *RENAMED], "; transformers' TrainingArguments has no such name")


def _check_value(name: str, value: Any, argument: Argument) -> None:
    if value is None:
        return
    if choices := CHOICES.get(name, argument.choices):
        if value not in choices:
            raise KeyProblem(name, one_of(value, choices))
        return
    checkable = all(kind in _TYPES for kind in argument.types)
    if checkable and not any(_fits(value, kind) for kind in argument.types):
        wanted = " or ".join(_TYPES[kind][1] for kind in argument.types if kind != "None")
        raise KeyProblem(name, f"must be {wanted}, got {shown(value)}")
    if isinstance(value, str) and "dict" in argument.types:
        _check_json(name, value)
    if name == "optim_args" and not all(part.count("=") == 1 for part in value.split(",")):
        raise KeyProblem(name, f"must be key=value pairs with commas between, got {shown(value)}")
    if isinstance(value, (int, float)):
        _check_bounds(name, value)


def _fits(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "bool"
    return isinstance(value, _TYPES[kind][0])


def _check_json(name: str, value: str) -> None:
    """A mapping may also be written as JSON, or (accelerator_config) be in a file."""
    try:
        mapping = isinstance(json.loads(value), dict)
    except ValueError:
        mapping = os.path.isfile(value)
    if not mapping:
        raise KeyProblem(name, f"must be a mapping of keys to values, got {shown(value)}")


def _check_bounds(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise KeyProblem(name, f"must be a finite number, got {value:g}")
    if name == "warmup_ratio" and value >= 1:
        raise KeyProblem(name, f"must be a share of the steps, below 1, got {value:g}; warmup_steps counts steps")
    if value >= BELOW.get(name, math.inf):
        raise KeyProblem(name, f"must be < {BELOW[name]}, got {value:g}")
    if name in POSITIVE and not value > 0:
        raise KeyProblem(name, f"must be > 0, got {value:g}")
    if name in NOT_NEGATIVE and not value >= 0:
        raise KeyProblem(name, f"must be >= 0, got {value:g}")
    if name == "max_steps" and value == 0:
        raise KeyProblem(name, "must be > 0, or -1 to train for num_train_epochs; a run of no steps trains nothing")
