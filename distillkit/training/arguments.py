"""`training_args` of the YAML become transformers' TrainingArguments.

Every argument passes straight through, over a few defaults of this package. What is applied to the student alone
(gradient checkpointing, compilation of its layers) is taken out of Trainer's hands here, for Trainer would apply it to
all that it wraps. Names and types were checked when the YAML was read; what TrainingArguments itself refuses ends as
one line that names `training_args.<key>`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_bitsandbytes_available, is_torchao_available

from distillkit.config import RunConfig
from distillkit.config.errors import UserError, reading, reason
from distillkit.config.losses import ATTENTION_FUNCTIONS, HIDDEN_STATE_FUNCTIONS
from distillkit.training.compilation import Compilation

SAVE_MINUTES = 15.0
"""Minutes between checkpoints of a run whose training_args say nothing of saving."""


@dataclass(frozen=True)
class StudentTechniques:
    """What is applied to the student alone, and therefore not by Trainer."""

    gradient_checkpointing: bool
    gradient_checkpointing_kwargs: dict[str, Any]
    compilation: Compilation | None


_OF_TECHNIQUES = {f"{name}_checkpointing{end}" for name in ("gradient", "activation") for end in ("", "_kwargs")}
_OF_TECHNIQUES |= {f"torch_compile{end}" for end in ("", "_backend", "_mode")}


@dataclass(frozen=True)
class Arguments:
    """The `training_args` of a phase: for transformers' Trainer, and for the student alone."""

    trainer: TrainingArguments
    techniques: StudentTechniques


def build_arguments(config: RunConfig) -> Arguments:
    """The arguments of a phase; building them sets up devices and processes. Raises UserError as below."""
    functions = {loss.function for loss in config.loss_functions}
    # Hidden states alone leave the head without a gradient; what attention outputs alone do not reach is frozen.
    uses_logits = not functions & {*HIDDEN_STATE_FUNCTIONS} or bool(
        functions - {*HIDDEN_STATE_FUNCTIONS, *ATTENTION_FUNCTIONS}
    )
    trainer, techniques = build_training_arguments(
        config.training_args,
        Path(config.output_path),
        uses_logits=uses_logits,
        project_name=config.project_name,
    )
    return Arguments(trainer, techniques)


def build_training_arguments(
    given: Mapping[str, Any], output_path: Path, *, uses_logits: bool, project_name: str = "distillkit"
) -> tuple[TrainingArguments, StudentTechniques]:
    """TrainingArguments for the `training_args` of a RunConfig, and what is for the student alone.

    `uses_logits`: a loss on the logits gives every parameter of the student a gradient. `project_name` is for trackers.
    Raises UserError for what TrainingArguments refuses.
    """
    values = {name: value for name, value in given.items() if name not in _OF_TECHNIQUES}
    defaults = {
        "report_to": "none",
        "logging_steps": 10,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_total_limit": 2,
        "save_strategy": "steps" if "save_steps" in values else "no",
        "use_cpu": not torch.accelerator.is_available(),
        # Without a loss on logits, the head and the last layers get no gradient, which DDP must be told to expect.
        "ddp_find_unused_parameters": not uses_logits,
    }
    ours = {
        "output_dir": str(output_path),
        "project": project_name,
        "remove_unused_columns": False,
        "label_names": ["targets"],
        "include_num_input_tokens_seen": "no",  # the trainer counts real tokens itself
        "disable_tqdm": True,
        "push_to_hub": False,  # `training.hub` uploads the folder when everything in it is written
    }
    arguments = _construct({**defaults, **values, **ours}, given)
    installed = get_available_reporting_integrations()
    for tracker in arguments.report_to:
        if tracker not in installed:
            raise UserError(
                "training_args.report_to", f"{tracker!r} is not installed; there is {', '.join(installed) or 'none'}"
            )
    if arguments.accelerator_config.dispatch_batches:
        raise UserError("training_args.accelerator_config", "dispatch_batches: each process reads its rows; remove it")
    _check_optimizer_is_installed(arguments)
    _check_schedule(arguments)
    return arguments, student_techniques(given)


def _check_optimizer_is_installed(arguments: TrainingArguments) -> None:
    """8-bit optimizers come from packages that a run without them does not need."""
    optim = arguments.optim.value
    if optim in ("adamw_torch_8bit", "adamw_torch_4bit") and not is_torchao_available():
        raise UserError("training_args.optim", f"{optim} needs torchao: pip install 'distillkit[torchao]'")
    if optim in ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit") and not is_bitsandbytes_available():
        raise UserError("training_args.optim", f"{optim} needs bitsandbytes; install it, or use adamw_torch_8bit")


def _check_schedule(arguments: TrainingArguments) -> None:
    """Trainer makes the schedule only when all is loaded, so it is made once before."""
    optimizer = torch.optim.SGD([torch.zeros(1)])
    with reading("training_args.lr_scheduler_kwargs", f"do not fit {arguments.lr_scheduler_type}: "):
        kwargs = arguments.lr_scheduler_kwargs
        get_scheduler(arguments.lr_scheduler_type, optimizer, 0, 1000, scheduler_specific_kwargs=kwargs)


def saves_by_the_clock(given: Mapping[str, Any]) -> bool:
    """Whether the user left it to this package when checkpoints are written."""
    return "save_steps" not in given and "save_strategy" not in given


def student_techniques(given: Mapping[str, Any]) -> StudentTechniques:
    """What of `training_args` is for the student alone; transformers knows checkpointing by two names."""

    def value(name: str) -> Any:
        return given.get(f"gradient_{name}") or given.get(f"activation_{name}")

    backend, mode = given.get("torch_compile_backend"), given.get("torch_compile_mode")
    compiled = given.get("torch_compile") or backend or mode
    return StudentTechniques(
        gradient_checkpointing=bool(value("checkpointing")),
        gradient_checkpointing_kwargs={"use_reentrant": False, **(value("checkpointing_kwargs") or {})},
        compilation=Compilation(backend or "inductor", mode) if compiled else None,
    )


def _construct(values: Mapping[str, Any], given: Mapping[str, Any]) -> TrainingArguments:
    try:
        return TrainingArguments(**values)
    except Exception as error:  # whatever transformers raises for what the user gave
        culprit = _culprit(values, given)
        raise UserError(f"training_args{'.' + culprit if culprit else ''}", reason(error)) from error


def _culprit(values: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """The argument of the user's without which TrainingArguments accepts the rest, if there is one."""
    for key in given:
        try:
            TrainingArguments(**{name: value for name, value in values.items() if name != key})
        except Exception:
            continue
        return key
    return None
