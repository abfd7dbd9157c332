"""`phases`: what each phase of a run changes in the top level of the YAML."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from distillkit.config.data import move_dataset_keys
from distillkit.config.errors import KeyProblem, shown
from distillkit.config.section import Section
from distillkit.config.tokens import BUDGETS, TokenBudget, budgets, check_one_budget
from distillkit.config.training_args import check_training_args

MERGED = ("training_args", "dataset", "evaluation")
"""Sections of a phase that are merged into the top level's; the other keys replace the top level's."""

HUB = ("push_to_hub", "hub_")
"""Prefixes of the training arguments that belong to the whole run."""

_NAME = re.compile(r"[a-z0-9_-]+")


class PhaseConfig(Section):
    """One phase: its name, and what differs from the top level.

    Values are as in the YAML: they are checked by `resolve`, together with those of the top level.
    """

    name: str = Field(
        description="name of the phase, unique: letters a-z, digits, _ and -",
        json_schema_extra={"pattern": f"^{_NAME.pattern}$"},
    )
    tokens: TokenBudget = Field(None, description="length of this phase in tokens: 100M")
    teacher: Any = Field(None, description="another teacher")
    frozen_modules: Any = Field(None, description="other frozen modules")
    frozen_res: Any = Field(None, description="other patterns of frozen parameters; [] trains all")
    lora: Any = Field(None, description="an adapter that is trained in this phase")
    sequence_length: Any = Field(None, description="another length of rows, in tokens")
    dataset: Any = Field(None, description="keys of dataset that differ")
    rollouts: Any = Field(None, description="what the student writes in this phase")
    loss_functions: Any = Field(None, description="other losses")
    layer_mapping: Any = Field(None, description="another mapping of layers")
    force_hidden_state_projection: Any = Field(None, description="whether hs_ losses use a learned projection")
    training_args: dict[str, Any] = Field(default={}, description="training arguments that differ")
    trained_weights: Any = Field(None, description="another storage of weights that train")
    frozen_precision: Any = Field(None, description="whether frozen linear layers compute in float8; null for no")
    evaluation: Any = Field(None, description="keys of evaluation that differ; null measures nothing")

    @model_validator(mode="before")
    @classmethod
    def move_keys(cls, data: Any) -> Any:
        return move_dataset_keys(data)

    @field_validator("name")
    @classmethod
    def check_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise KeyProblem("", f"names a folder: letters a-z, digits, _ and - only, got {shown(name)}")
        return name

    @field_validator("training_args")
    @classmethod
    def check_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        checked = check_training_args(arguments)
        for name in checked:
            if name.startswith(HUB):
                raise KeyProblem(name, "the whole run is uploaded, once; move it to training_args of the top level")
        return checked

    @model_validator(mode="after")
    def check_budget(self) -> "PhaseConfig":
        check_one_budget(self.changes)
        return self

    @model_serializer(mode="wrap")
    def only_what_is_named(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Only the keys of the phase: a key that is absent is the top level's, one that is null is not."""
        named: dict[str, Any] = handler(self)
        return {key: value for key, value in named.items() if key in self.model_fields_set}

    @property
    def changes(self) -> dict[str, Any]:
        """The keys of the phase, without its name."""
        return {key: getattr(self, key) for key in type(self).model_fields if key in self.model_fields_set - {"name"}}

    def names(self, key: str) -> bool:
        """Whether a key such as `dataset.train_dataset.split` is in the phase itself, not only at the top level."""
        section: Any = self.changes
        for depth, part in enumerate(key.split(".")):
            name = part.partition("[")[0]
            if name not in section:
                return False
            section = section[name]
            if not isinstance(section, Mapping) or (depth == 0 and name not in MERGED):
                return True
        return True

    def replaces(self, key: str) -> bool:
        """Whether the phase has its own value of `key`, such as `tokens`, so that the top level's has no effect."""
        if tuple(key.split(".")) in BUDGETS:
            return bool(budgets(self.changes))
        value: Any = self.changes
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return False
            value = value[part]
            if key.partition(".")[0] not in MERGED or not isinstance(value, Mapping):
                return True
        return False
