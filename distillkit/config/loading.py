"""From a YAML file and overrides of the command line to a checked `RunConfig`. No torch is imported on the way."""

import logging
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from distillkit.config.errors import UserError
from distillkit.config.run import RunConfig

logger = logging.getLogger(__name__)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-3` is a number (YAML 1.1 asks for `1.0e-3`) and a key may appear once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} appears twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file describes, changed by `key=value` overrides.

    Raises `UserError`, one line that names the key and the remedy; warns of a key without effect.
    """
    data = read_yaml(path)
    for override in overrides:
        apply_override(data, override)
    config = RunConfig.parse(data)
    if config.functionary_packing:
        logger.warning("functionary_packing: has no effect; packed documents never see each other anyway")
    return config


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises `UserError` with the line of a mistake."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that is none
        raise UserError(f"{path}: {_yaml_problem(error)}") from None
    if data is None:
        raise UserError(f"{path}: is empty; it must hold the keys of a run (teacher, dataset, output_path, ...)")
    if not isinstance(data, dict):
        raise UserError(f"{path}: must hold keys and values (key: value), but is a {type(data).__name__}")
    return data


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one key in place: `training_args.learning_rate=3e-4`, `loss_functions.1.weight=0.5`.

    Values are YAML. Sections on the way are made where the file has none; whether a key exists is for the
    validation to say.
    """
    path, equals, text = override.partition("=")
    if not equals or not path or "" in path.split("."):
        raise UserError(f"override {override!r}: must be key=value, such as training_args.learning_rate=3e-4")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"override {override!r}: the value is no YAML: {_yaml_problem(error)}") from None
    *parents, last = path.split(".")
    section: Any = data
    for parent in parents:
        key = _key_in(section, parent, override)
        if isinstance(section, dict) and section.get(key) is None:
            section[key] = {}
        section = section[key]
    section[_key_in(section, last, override)] = value


def _key_in(section: Any, key: str, override: str) -> Any:
    """`key` as an index where `section` is a list. Raises `UserError` where it cannot be a key."""
    if isinstance(section, dict):
        return key
    if not isinstance(section, list):
        raise UserError(f"override {override!r}: {key!r} is no key: what stands before it is a single value")
    if not key.isdigit() or int(key) >= len(section):
        raise UserError(f"override {override!r}: {key!r} must be an index from 0 to {len(section) - 1} of a list")
    return int(key)


def _yaml_problem(error: Exception) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    return f"line {error.problem_mark.line + 1}: {error.problem or error.context}"
