"""The base of every section of the YAML: no unknown keys, no missing keys, no silent conversion."""

import json
import os
from typing import Annotated, Any, ClassVar, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from distillkit.config.errors import KeyProblem, did_you_mean, user_error


class Section(BaseModel):
    """A mapping of the YAML. The description of each field is the documentation of the key."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def check_keys(cls, data: Any) -> Any:
        """Refuse unknown and missing keys here, where the known keys can be listed.

        A key that is null is not given, unless null is a value of its own (`dataset.seed`).
        """
        if not isinstance(data, dict):
            return data
        for key in data:
            if key not in cls.model_fields:
                raise KeyProblem(str(key), f"unknown key{cls.instead_of(str(key))}")
        given = {key: value for key, value in data.items() if value is not None or cls._takes_null(key)}
        for name, field in cls.model_fields.items():
            if field.is_required() and name not in given:
                raise KeyProblem(name, f"is missing: {field.description}")
        return given

    @classmethod
    def instead_of(cls, key: str) -> str:
        """What may have been meant by an unknown key, to be added to the message."""
        return did_you_mean(key, cls.model_fields, f"; known keys: {', '.join(cls.model_fields)}")

    @classmethod
    def _takes_null(cls, key: str) -> bool:
        annotation = cls.model_fields[key].annotation
        return annotation is Any or type(None) in get_args(annotation)

    @classmethod
    def parse(cls, data: Any) -> Self:
        """The section from plain data, as YAML gives it. Raises `UserError`."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise user_error(error, data) from None


_KINDS = {
    "a run": ("distillkit", ("loss_functions", "training_args", "phases", "model", "layer_mapping", "frozen_res")),
    "a capture": ("distillkit capture", ("compression", "rows_per_shard", "tokens_per_batch", "engine")),
    "an evaluation": (
        "distillkit evaluate",
        ("students", "divergence", "generation", "benchmarks", "needles", "long_context", "speed"),
    ),
    "a synthetic text": ("distillkit synthesize", ("tokenizer", "repeated_passages", "questions_about_facts")),
    "a written text": ("distillkit write", ("documents", "temperatures", "documents_per_file")),
}
"""For each kind of file, the command that reads it, and keys that others do not have."""


class WholeFile(Section):
    """The content of a YAML file."""

    kind_of_file: ClassVar[str]
    """One of the kinds above."""

    @model_validator(mode="before")
    @classmethod
    def check_kind_of_file(cls, data: Any) -> Any:
        """Refuse the file of another command with the name of that command."""
        for kind, (command, keys) in _KINDS.items():
            for key in keys:
                if isinstance(data, dict) and key in data and key not in cls.model_fields:
                    read_as = f"{cls.kind_of_file} has no such key, {kind} has"
                    raise KeyProblem(key, f"{read_as}; where this is the file of {kind}: {command} CONFIG.yaml")
        return data


def _check_loading_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Without those that are null. They are kept as JSON with what was made of them."""
    for name, value in arguments.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise KeyProblem(name, f"{value} is a {type(value).__name__} here; write text in quotes") from None
    return {name: value for name, value in arguments.items() if value is not None}


def _check_path(path: str) -> str:
    if not path.strip():
        raise KeyProblem("", "must not be empty; name a folder, a file or a hub id")
    return os.path.expanduser(path)


PathText = Annotated[str, AfterValidator(_check_path)]
"""A folder, file or hub id; `~` is the home folder."""

LoadingArguments = Annotated[dict[str, Any], AfterValidator(_check_loading_arguments)]
"""Keyword arguments of `from_pretrained`; one that is null is not given."""
