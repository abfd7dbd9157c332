"""Reads YAML files with the files that they extend, and applies overrides of the command line."""

import os
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from distillkit.config.data import move_dataset_keys
from distillkit.config.errors import UserError, did_you_mean, reading, reason, shown
from distillkit.config.merging import merged
from distillkit.config.section import Section
from distillkit.config.tokens import BUDGETS, without_budget

AnySection = TypeVar("AnySection", bound=Section)


_MOST_BYTES = 2**20
_MOST_VALUES = 100_000
_MOST_LEVELS = 50
"""What a configuration may hold. Aliases of a few lines may stand for billions of values."""


class _Loader(yaml.SafeLoader):
    """Safe YAML of what JSON has: a date is text.

    `1e-3` is a number (YAML 1.1 requires `1.0e-3`), and a key may appear once.
    """

    def get_single_node(self) -> yaml.Node | None:
        """The whole document, refused where it is more than a configuration."""
        node: yaml.Node | None = super().get_single_node()
        waiting, seen = [(node, 0)] if node is not None else [], 0
        while waiting:
            each, level = waiting.pop()
            seen += 1
            problem = ""
            if seen > _MOST_VALUES:
                problem = f"holds more than {_MOST_VALUES:,} values"
            elif level > _MOST_LEVELS:
                problem = f"is nested more than {_MOST_LEVELS} levels deep"
            elif isinstance(each, yaml.MappingNode):
                waiting += [(part, level + 1) for pair in each.value for part in pair]
            elif isinstance(each, yaml.SequenceNode):
                waiting += [(part, level + 1) for part in each.value]
            elif unprintable := re.search("[\0\ud800-\udfff]", each.value):
                problem = f"holds the character {unprintable.group()!r}, which no text has"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, each.start_mark)
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number: int = super().construct_yaml_int(node)
        if abs(number) >= 2**63:
            problem = "a number this large is of no use; put it in quotes where it is text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return number

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


_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in _PLAIN
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, over that of the file it `extends`, if any.

    Mappings are merged, lists and values replaced; the path is relative to the file that names it. Raises `UserError`
    with the file and the line of a mistake.
    """
    return _extended(path, [])


def _extended(path: Path, extending: list[Path]) -> dict[str, Any]:
    """`read_yaml` of a file; `extending` are the files that led to it, each of which extends the next."""
    data = read_mapping(path)
    if "extends" not in data:
        return data
    named = data.pop("extends")
    if not isinstance(named, str) or not named:
        raise UserError(path, f"extends: must be the path of a YAML file, got {shown(named)}")
    base = path.parent / os.path.expanduser(named)
    chain = [*extending, path]
    if not base.is_file():
        raise UserError(path, f"extends: no such file: {str(base)!r}")
    if any(base.samefile(each) for each in chain):
        circle = " extends ".join(each.name for each in [*chain, base])
        raise UserError(path, f"extends: is circular ({circle}); one of them must not extend another")
    return merged(move_dataset_keys(_extended(base, chain)), move_dataset_keys(data))


def read_changed(path: Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """`read_yaml`, changed by `key=value` overrides; these alone where there is no file. Raises `UserError`."""
    data = {} if path is None else read_yaml(path)
    for override in overrides:
        apply_override(data, override)
    return data


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in one YAML file, as it is written."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        text = content.decode()
    except FileNotFoundError:
        raise UserError(path, "no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(path, f"cannot be read as text: {error}") from None
    if len(content) > _MOST_BYTES:
        raise UserError(path, f"is larger than {_MOST_BYTES // 2**20} MiB, so it is no configuration")
    data = _parsed(text, str(path), "")
    if data is None:
        raise UserError(path, "is empty; it must hold the keys of a run (teacher, dataset, output_path, ...)")
    if not isinstance(data, dict):
        raise UserError(path, f"must hold keys and values (key: value), but is a {type(data).__name__}")
    return data


def as_section(kind: type[AnySection], given: AnySection | Mapping[str, Any] | str | os.PathLike[str]) -> AnySection:
    """A configuration in any form: parsed, the content of a YAML file, or its path. Raises `UserError`."""
    if isinstance(given, kind):
        return given
    data = read_yaml(Path(given)) if isinstance(given, str | os.PathLike) else given
    return kind.parse(data)


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one key in place: `training_args.learning_rate=3e-4`, `loss_functions.1.weight=0.5`, `phases.long.tokens=1M`.

    Values are YAML. Sections that the file does not have are added; whether a key exists is checked later, with the
    whole configuration. A budget (tokens, steps or epochs) replaces the one of the file.
    """
    path, equals, text = override.partition("=")
    if not equals or not path or "" in path.split("."):
        raise UserError(f"override {shown(override)}", "must be key=value, such as training_args.learning_rate=3e-4")
    if path == "extends":
        problem = "write it into the file instead; an override cannot change what a file extends"
        raise UserError(f"override {shown(override)}", problem)
    value = _parsed(text, f"override {shown(override)}", "the value is not YAML: ")
    *parents, last = path.split(".")
    sections: list[Any] = [data]
    for parent in parents:
        key = _key_in(sections[-1], parent, override)
        if isinstance(sections[-1], dict) and sections[-1].get(key) is None:
            sections[-1][key] = {}
        sections.append(sections[-1][key])
    sections[-1][_key_in(sections[-1], last, override)] = value
    for budget in BUDGETS:
        if (*parents, last)[-len(budget) :] == budget:
            level = sections[-len(budget)]
            kept = without_budget(level, but=budget)
            level.clear()
            level.update(kept)


def _key_in(section: Any, key: str, override: str) -> Any:
    """`key` as an index where `section` is a list: from a number, or from the `name` of an entry.

    Raises `UserError` where the section has no place for it.
    """
    if isinstance(section, dict):
        return key
    if not isinstance(section, list):
        raise UserError(f"override {shown(override)}", f"{key!r} is not a key: the part before it is a single value")
    if key in map(str, range(len(section))):
        return int(key)
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in section]
    if key in names:
        return names.index(key)
    known = [name for name in names if isinstance(name, str)]
    wanted = (
        f"must be an index from 0 to {len(section) - 1} of a list" if section else "has no place: the list is empty"
    )
    named = f", or one of {', '.join(known)}{did_you_mean(key, known)}" if known else ""
    raise UserError(f"override {shown(override)}", f"{key!r} {wanted}{named}")


def _parsed(text: str, key: str, prefix: str) -> Any:
    """The value of a YAML document. Raises `UserError`."""
    with reading(key, prefix, _yaml_problem):
        return yaml.load(text, Loader=_Loader)


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return reason(error)
    return f"line {error.problem_mark.line + 1}: {error.problem or error.context}"
