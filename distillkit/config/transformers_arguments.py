"""The arguments of transformers' `TrainingArguments`: name, types, choices and description.

They are in a data file of this package, because importing `TrainingArguments` imports torch, which takes seconds that
a mistyped key should not cost. `scripts/update_training_args.py` writes the file from the installed transformers.
Where another version is installed, a name that is not in the file is looked up there.
"""

import dataclasses
import enum
import functools
import importlib.metadata
import inspect
import json
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("training_args.json")


@dataclass(frozen=True)
class Argument:
    """One argument. types: names such as bool, int, list or None. choices: the values that an enumeration has."""

    types: tuple[str, ...]
    choices: tuple[str, ...] = ()
    description: str = ""


@functools.cache
def known_arguments() -> dict[str, Argument]:
    """The arguments in the data file."""
    return {
        name: Argument(tuple(each["types"]), tuple(each.get("choices", ())), each.get("description", ""))
        for name, each in _content()["arguments"].items()
    }


def find_argument(name: str) -> Argument | None:
    """The argument of a name: from the file, or from the installed transformers where that is another version."""
    if name in known_arguments() or importlib.metadata.version("transformers") == _content()["transformers"]:
        return known_arguments().get(name)
    return installed_arguments().get(name)


@functools.cache
def installed_arguments() -> dict[str, Argument]:
    """The arguments of the installed `TrainingArguments`. Imports torch."""
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    descriptions = _descriptions(inspect.cleandoc(TrainingArguments.__doc__ or ""))
    return {
        field.name: _argument(hints[field.name], descriptions.get(field.name, ""))
        for field in dataclasses.fields(TrainingArguments)
        if field.init
    }


@functools.cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


def _argument(annotation: Any, description: str) -> Argument:
    """From an annotation such as `IntervalStrategy | str` or `dict[str, Any] | str | None`."""
    kinds = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    enumerations: list[Any] = [kind for kind in kinds if isinstance(kind, enum.EnumMeta)]
    choices = [member.value for enumeration in enumerations for member in enumeration]
    return Argument(
        tuple("None" if kind is type(None) else kind.__name__ for kind in kinds), tuple(choices), description
    )


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, type(int | str))


def _descriptions(text: str) -> dict[str, str]:
    """The first paragraph that a docstring has about each argument, without markup."""
    found = re.finditer(r"^ {4}(\w+) ?\([^\n]*\):\n((?: {8}[^\n]*\n)+)", text + "\n", re.MULTILINE)
    return {match[1]: re.sub(r"[`*\[\]]", "", " ".join(match[2].split())) for match in found}
