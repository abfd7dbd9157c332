"""A budget: the length of training in tokens, steps or epochs, one of the three."""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from distillkit.config.errors import KeyProblem, shown

BUDGETS = (("tokens",), ("training_args", "max_steps"), ("training_args", "num_train_epochs"))
"""The keys of a budget, each as its path below the top level or a phase."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_COUNT = re.compile(r"(\d[\d_]*(?:\.\d+)?) ?([kmb]?)", re.IGNORECASE)


def parse_tokens(value: Any) -> Any:
    """A number of tokens from a whole number or from text such as `300M`, `1.5B` or `20k`; None stays None."""
    if value is None:
        return None
    count: Decimal | None = None
    if isinstance(value, str) and (match := _COUNT.fullmatch(value.strip())):
        count = Decimal(match[1].replace("_", "")) * _UNITS[match[2].lower()]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        count = Decimal(value)
    if count is None or not count.is_finite() or count != count.to_integral_value():
        raise KeyProblem(
            "", f"must be a whole number of tokens, such as 300000000, 300M, 1.5B or 20k; got {shown(value)}"
        )
    if count <= 0:
        raise KeyProblem("", f"must be > 0, got {shown(value)}")
    return int(count)


TokenBudget = Annotated[
    int | None,
    BeforeValidator(parse_tokens),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "exclusiveMinimum": 0},
                {"type": "string", "pattern": r"^[0-9][0-9_]*(\.[0-9]+)? ?[kKmMbB]?$"},
                {"type": "null"},
            ]
        }
    ),
]


def budgets(section: Mapping[str, Any]) -> list[str]:
    """The keys with which the top level or a phase sets a budget: `tokens`, `training_args.max_steps`, ...

    A negative `max_steps` is transformers' way to set none.
    """
    values = {".".join(budget): _value(section, budget) for budget in BUDGETS}
    steps = "training_args.max_steps"
    if isinstance(values[steps], int) and values[steps] < 0:
        values[steps] = None
    return [name for name, value in values.items() if value is not None]


def check_one_budget(section: Mapping[str, Any]) -> None:
    """Raises `KeyProblem` where the top level or a phase has two budgets."""
    named = budgets(section)
    if len(named) > 1:
        raise KeyProblem(named[0], f"{named[1]} is given too; keep one of the two")


def without_budget(section: Mapping[str, Any], but: tuple[str, ...] = ()) -> dict[str, Any]:
    """The section without budgets, except `but`."""
    kept = dict(section)
    for *within, name in (budget for budget in BUDGETS if budget != but):
        if not within:
            kept.pop(name, None)
        elif isinstance(kept.get(within[0]), Mapping):
            kept[within[0]] = {key: value for key, value in kept[within[0]].items() if key != name}
    return kept


def _value(section: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        section = section.get(key) if isinstance(section, Mapping) else None
    return section
