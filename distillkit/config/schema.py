"""The JSON schema of each kind of YAML, for editors: names, values and descriptions while typing.

It is made from the sections themselves and from the known arguments of transformers. A schema does not express all
checks: which keys exclude each other, and which files do not exist, is checked when the YAML is read.
"""

import copy
from typing import Any, Literal

from distillkit.config.capture import CaptureConfig
from distillkit.config.data import TRL_KEYS
from distillkit.config.evaluate import EvaluateConfig
from distillkit.config.phases import MERGED
from distillkit.config.run import RunConfig
from distillkit.config.section import Section
from distillkit.config.synthetic import SyntheticTextConfig
from distillkit.config.training_args import (
    BELOW,
    CHOICES,
    NOT_NEGATIVE,
    POSITIVE,
    RENAMED,
    SET_BY_THE_RUN,
    WITHOUT_EFFECT,
)
from distillkit.config.transformers_arguments import Argument, known_arguments
from distillkit.config.written import WrittenTextConfig

Kind = Literal["run", "capture", "evaluate", "synthesize", "write"]
Schema = dict[str, Any]

SECTIONS: dict[Kind, type[Section]] = {
    "run": RunConfig,
    "capture": CaptureConfig,
    "evaluate": EvaluateConfig,
    "synthesize": SyntheticTextConfig,
    "write": WrittenTextConfig,
}

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_REF = "#/$defs/"
_CHANGES = "Changes"
_EXTENDS = {
    "type": "string",
    "description": "another file, relative to this one; this one contains only the differences",
}
_JSON_TYPES = {
    "bool": "boolean",
    "int": "integer",
    "float": "number",
    "str": "string",
    "list": "array",
    "dict": "object",
    "None": "null",
}


def json_schema(kind: Kind) -> Schema:
    """The schema (draft 2020-12) of the YAML of a run, a capture, an evaluation, a synthetic or a written text.

    A file that extends another need not be complete, at any depth: it is checked against variants of the sections in
    which nothing is required.
    """
    section = SECTIONS[kind]
    found = section.model_json_schema()
    definitions: dict[str, Schema] = found.pop("$defs", {})
    definitions[section.__name__] = found
    for definition in definitions.values():
        _simplify(definition)
    if section is RunConfig:
        definitions["TrainingArguments"] = _training_arguments(definitions)
        description = found["properties"]["training_args"]["description"]
        described = {"$ref": f"{_REF}TrainingArguments", "description": description}
        found["properties"]["training_args"] = _or_null(described)
    found["properties"] = {"extends": _EXTENDS, **found["properties"]}
    partial = _with_demands(definitions) | {section.__name__}
    definitions |= {name + _CHANGES: _changes(definitions[name], partial) for name in partial}
    if section is RunConfig:
        _describe_phases(definitions)
    root = {
        "$schema": _DIALECT,
        "title": f"distillkit: {kind}",
        "description": found.get("description", ""),
        "type": "object",
        "if": {"required": ["extends"]},
        "then": {"$ref": f"{_REF}{section.__name__}{_CHANGES}"},
        "else": {"$ref": f"{_REF}{section.__name__}"},
    }
    return {**root, "$defs": dict(sorted(definitions.items()))}


def _simplify(node: Any) -> None:
    """Remove, in place, what an editor does not show, and let keys that need not be given be null."""
    if isinstance(node, list):
        for inner in node:
            _simplify(inner)
    if not isinstance(node, dict):
        return
    for inner in node.values():
        _simplify(inner)
    for name, described in node["properties"].items() if isinstance(node.get("properties"), dict) else ():
        if name not in node.get("required", ()):
            node["properties"][name] = _or_null(described)
    if isinstance(node.get("title"), str):
        del node["title"]
    if isinstance(node.get("description"), str):
        node["description"] = " ".join(node["description"].split("\n\n")[0].split())
    if node.get("default", 0) is None:
        del node["default"]
    node.pop("discriminator", None)


def _with_demands(definitions: dict[str, Schema]) -> set[str]:
    """The sections that require a key, or contain a section that does."""
    found: set[str] = set()
    before = -1
    while len(found) > before:
        before = len(found)
        for name, definition in definitions.items():
            if _changes(definition, found) != definition:
                found.add(name)
    return found


def _changes(definition: Schema, partial: set[str]) -> Schema:
    """The variant of a section in which nothing is required. Entries of lists stay whole, as lists are replaced."""

    def part(node: Any) -> Any:
        if isinstance(node, list):
            return [part(each) for each in node]
        if not isinstance(node, dict):
            return node
        kept = {key: value for key, value in node.items() if key != "required"}
        if "oneOf" in kept:  # parts of several kinds may look the same
            kept["anyOf"] = kept.pop("oneOf")
        if str(kept.get("$ref", "")).removeprefix(_REF) in partial:
            kept["$ref"] += _CHANGES
        return {key: value if key in ("items", "prefixItems") else part(value) for key, value in kept.items()}

    changed = part(definition)
    assert isinstance(changed, dict)
    return changed


def _describe_phases(definitions: dict[str, Schema]) -> None:
    """Give the keys of a phase, which have no types of their own, the schema that they have at the top level."""
    run, changes = definitions["RunConfig"]["properties"], definitions["RunConfigChanges"]["properties"]
    for name, described in definitions["PhaseConfig"]["properties"].items():
        if name not in ("name", "tokens"):
            definition = copy.deepcopy((changes if name in MERGED else run)[name])
            definition.pop("default", None)
            definitions["PhaseConfig"]["properties"][name] = definition | {"description": described["description"]}


def _training_arguments(definitions: dict[str, Schema]) -> Schema:
    """`training_args`: all names, also older ones; those that the run sets only with a value that switches them off."""
    properties: dict[str, Schema] = {}
    arguments = known_arguments()
    for name, argument in arguments.items():
        if name not in (*SET_BY_THE_RUN, *WITHOUT_EFFECT):
            described = {"description": argument.description} if argument.description else {}
            properties[name] = _or_null(_value(name, argument) | described)
    for older, newer in RENAMED.items():
        description = {"description": f"transformers calls this {newer} now", "deprecated": True}
        properties[older] = _or_null(_value(older, arguments[newer]) | description)
    for name in TRL_KEYS:
        properties[name] = copy.deepcopy(definitions["DatasetConfig"]["properties"][name])
    for name in WITHOUT_EFFECT:
        properties[name] = {"description": "has no effect here", "deprecated": True}
    for name, remedy in SET_BY_THE_RUN.items():
        properties[name] = {"enum": [None, False, 0, "", [], {}], "description": remedy, "deprecated": True}
    return {
        "description": "`training_args`: the arguments of transformers' Trainer.",
        "type": "object",
        "properties": dict(sorted(properties.items())),
        "additionalProperties": False,
    }


def _value(name: str, argument: Argument) -> Schema:
    """The schema of an argument, as `training_args` checks it."""
    if choices := CHOICES.get(name, argument.choices):
        return {"enum": [*choices, False] if name.endswith("_strategy") else [*choices]}
    schema: Schema = {}
    if all(kind in _JSON_TYPES for kind in argument.types):
        schema["type"] = [_JSON_TYPES[kind] for kind in argument.types]
    if name in POSITIVE:
        schema["exclusiveMinimum"] = 0
    if name in NOT_NEGATIVE:
        schema["minimum"] = 0
    if name in BELOW:
        schema["exclusiveMaximum"] = BELOW[name]
    return schema


def _or_null(described: Schema) -> Schema:
    """The schema of a value, or of null."""
    null = {"type": "null"}
    if "enum" in described:
        return {**described, "enum": [*described["enum"], None]}
    if types := described.get("type"):
        types = [types] if isinstance(types, str) else types
        return {**described, "type": list(dict.fromkeys([*types, "null"]))}
    if "anyOf" in described:
        return described if null in described["anyOf"] else {**described, "anyOf": [*described["anyOf"], null]}
    if not {"$ref", "oneOf"} & described.keys():
        return described
    outside: Schema = {key: described.pop(key) for key in ("default", "description") if key in described}
    return {"anyOf": [described, null], **outside}
