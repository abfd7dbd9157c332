"""What of `training_args` a plan needs, with transformers' defaults where the YAML says nothing.

TrainingArguments itself would set up devices and processes, which a plan for another machine must not.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import TrainingArguments

from distillkit.config import RunConfig
from distillkit.training.arguments import student_techniques


@dataclass(frozen=True)
class Settings:
    """The training arguments of one run."""

    batch_size: int
    """Rows of a micro-batch on one GPU."""
    accumulation: int
    compute_dtype: torch.dtype
    optim: str
    learning_rate: float
    gradient_checkpointing: bool
    checkpoint_every: int | None
    """Every so many layers one is checkpointed; None: every layer."""
    torch_compile: bool
    warmup: float
    """Steps; below 1 a share of all."""
    max_steps: int
    num_train_epochs: float
    save_total_limit: int
    saves: bool
    """Whether checkpoints are written while it trains, and not only where it is interrupted."""
    push_to_hub: bool
    hub_model_id: str | None

    @classmethod
    def of(cls, config: RunConfig) -> "Settings":
        """The settings of a run without phases."""
        given = config.training_args
        dtype = torch.bfloat16 if _value(given, "bf16") else torch.float32
        techniques = student_techniques(given)
        return cls(
            batch_size=_value(given, "per_device_train_batch_size"),
            accumulation=_value(given, "gradient_accumulation_steps"),
            compute_dtype=dtype,
            optim=str(given.get("optim") or "adamw_torch"),
            learning_rate=float(_value(given, "learning_rate")),
            gradient_checkpointing=techniques.gradient_checkpointing,
            checkpoint_every=techniques.gradient_checkpointing_kwargs.get("every_n_layers"),
            torch_compile=techniques.compilation is not None,
            warmup=float(_value(given, "warmup_steps") or given.get("warmup_ratio") or 0),
            max_steps=int(_value(given, "max_steps")),
            num_train_epochs=float(_value(given, "num_train_epochs")),
            save_total_limit=given.get("save_total_limit") or 2,
            saves=given.get("save_strategy", "steps") != "no",
            push_to_hub=bool(given.get("push_to_hub")),
            hub_model_id=given.get("hub_model_id"),
        )


_DEFAULTS = {field.name: field.default for field in fields(TrainingArguments)}


def _value(given: dict[str, Any], name: str) -> Any:
    value = given.get(name)
    return _DEFAULTS[name] if value is None else value
