"""Which of the student's parameters are trained.

`frozen_res` are regular expressions searched in parameter names, `frozen_modules` are names of modules. Both see
every name that a tensor has: where the head shares the embeddings, `lm_head` freezes the shared tensor although the
checkpoint knows it only as `model.embed_tokens.weight`. A pattern that matches nothing is a mistake, and says so.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from distillkit.config.errors import UserError


@dataclass(frozen=True)
class Freezing:
    """What `freeze` did: numbers of parameters, a shared tensor counted once."""

    trainable: int
    frozen: int
    shared_with_frozen: list[tuple[str, str]]
    """Pairs (matched name, other name) of tensors frozen under a name that no pattern matched."""


def freeze(model: nn.Module, frozen_res: Sequence[str] = (), frozen_modules: Sequence[str] = ()) -> Freezing:
    """Set `requires_grad` of the model's parameters.

    Raises:
        UserError: a pattern or a module name matches nothing, or nothing is left to train.
    """
    check_frozen(model, frozen_res, frozen_modules)
    matched = freeze_matching(model, frozen_res, frozen_modules)
    names: dict[str, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    if trainable == 0:
        raise UserError("frozen_res", "together they freeze every parameter, nothing is left to train")
    shared = [
        (name, other)
        for name in sorted(matched)
        for other in sorted(names.keys() - matched)
        if names[name] is names[other]
    ]
    return Freezing(trainable=trainable, frozen=total - trainable, shared_with_frozen=shared)


def freeze_matching(model: nn.Module, frozen_res: Sequence[str], frozen_modules: Sequence[str]) -> set[str]:
    """Freeze what matches, whatever does not; the names that matched. A plan goes on where `freeze` would not."""
    names: dict[str, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
    matched = _matching(names, frozen_res, frozen_modules)
    frozen_ids = {id(names[name]) for name in matched}
    for parameter in names.values():
        parameter.requires_grad_(id(parameter) not in frozen_ids)
    return matched


def check_frozen(model: nn.Module, frozen_res: Sequence[str], frozen_modules: Sequence[str]) -> None:
    """Raises `UserError` as `freeze` would for patterns and names that match nothing; nothing is frozen."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for index, expression in enumerate(frozen_res):
        if not _matching(names, [expression], []):
            raise UserError(f"frozen_res[{index}]", f"{expression!r} matches no parameter; there are {examples(names)}")
    known = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    for index, module in enumerate(frozen_modules):
        if module not in known:
            raise UserError(f"frozen_modules[{index}]", f"there is no module {module!r}; there are {examples(known)}")


def freeze_all_but(model: nn.Module, reached: Iterable[nn.Parameter]) -> list[str]:
    """Freeze what no gradient reaches; the names of what would have been trained."""
    kept = {id(parameter) for parameter in reached}
    idle = [name for name, each in model.named_parameters() if each.requires_grad and id(each) not in kept]
    for name in idle:
        model.get_parameter(name).requires_grad_(False)
    return idle


def _matching(names: Iterable[str], expressions: Sequence[str], modules: Sequence[str]) -> set[str]:
    patterns = [re.compile(expression) for expression in expressions]
    prefixes = tuple(f"{module}." for module in modules)
    return {name for name in names if name.startswith(prefixes) or any(pattern.search(name) for pattern in patterns)}


def examples(names: Iterable[str]) -> str:
    """A few names of different kinds: layer numbers other than the first seen add nothing."""
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "N", name), name)
    few = list(kinds.values())
    step = max(1, len(few) // 4)
    return ", ".join(few[::step][:4])
