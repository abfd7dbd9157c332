"""Merges YAML into YAML: a phase into the top level, a file into the one that it extends."""

from collections.abc import Mapping
from typing import Any

from distillkit.config.teacher import with_kind
from distillkit.config.tokens import budgets, without_budget
from distillkit.config.training_args import RENAMED

_IDENTITY_KEYS = ("kind", "repo_id", "disk_path")
"""A section with another value of one of these replaces the former section instead of being merged into it."""


def merged(former: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`former` with `changes`: mappings key by key, at any depth; lists and values are replaced.

    A budget (tokens, steps or epochs) in `changes` replaces any budget in `former`, and a training argument in
    `changes` replaces that argument under its older or newer name.
    """
    result = without_budget(former) if budgets(changes) else dict(former)
    for key, value in changes.items():
        inherited = result.get(key)
        if key == "training_args" and isinstance(inherited, Mapping) and isinstance(value, Mapping):
            named = {RENAMED.get(name, name) for name in value}
            inherited = {name: each for name, each in inherited.items() if RENAMED.get(name, name) not in named}
        if isinstance(inherited, Mapping) and isinstance(value, Mapping) and not _about_another(inherited, value):
            result[key] = merged(inherited, value)
        else:
            result[key] = value
    return result


def _about_another(former: Mapping[str, Any], changes: Mapping[str, Any]) -> bool:
    former = with_kind(former)
    if "kind" in former:
        changes = with_kind(changes)
    return any(changes.get(name) not in (None, former.get(name)) for name in _IDENTITY_KEYS)
