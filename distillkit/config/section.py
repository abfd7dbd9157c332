"""The base of every section of the YAML: no unknown keys, no missing keys, no silent conversion."""

import os
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from distillkit.config.errors import KeyProblem, did_you_mean, user_error


class Section(BaseModel):
    """A mapping of the YAML. The description of each field is the documentation of the key."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def check_keys(cls, data: Any) -> Any:
        """Refuse unknown and missing keys here, where the known keys can be listed."""
        if not isinstance(data, dict):
            return data
        for key in data:
            if key not in cls.model_fields:
                known = f"; known keys: {', '.join(cls.model_fields)}"
                raise KeyProblem(str(key), f"unknown key{did_you_mean(str(key), cls.model_fields, known)}")
        for name, field in cls.model_fields.items():
            if field.is_required() and name not in data:
                raise KeyProblem(name, f"is missing: {field.description}")
        return data

    @classmethod
    def parse(cls, data: Any) -> Self:
        """The section from plain data, as YAML gives it. Raises `UserError`."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise user_error(error, data) from None


def none_is_empty(value: Any) -> Any:
    """The empty list for a key without a value."""
    return [] if value is None else value


def _empty_dict(value: Any) -> Any:
    return {} if value is None else value


def _given(value: Any) -> Any:
    value = _empty_dict(value)
    return {key: each for key, each in value.items() if each is not None} if isinstance(value, dict) else value


def _path(text: str) -> str:
    if not text.strip():
        raise KeyProblem("", "must not be empty; name a folder, a file or a hub id")
    return os.path.expanduser(text)


PathText = Annotated[str, AfterValidator(_path)]
"""A folder, file or hub id; `~` is the home folder."""

TextList = Annotated[list[str], BeforeValidator(none_is_empty, json_schema_input_type=list[str] | None)]
"""A list of text; a key without a value is the empty list."""

AnyMapping = Annotated[dict[str, Any], BeforeValidator(_empty_dict, json_schema_input_type=dict[str, Any] | None)]
"""A mapping that is passed on as it is; a key without a value is the empty mapping."""

KeywordArguments = Annotated[dict[str, Any], BeforeValidator(_given, json_schema_input_type=dict[str, Any] | None)]
"""Keyword arguments of a function; one that is null is not given, as are all without a value."""
