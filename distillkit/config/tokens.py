"""A budget: for how long is trained, in tokens, steps or epochs. One of the three at a time."""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from distillkit.config.errors import KeyProblem, shown

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


def token_text(count: int) -> str:
    """The number as `parse_tokens` reads it, in three digits at most: `300M`, `1.5B`, `20k`, `999`."""
    size, unit = next(
        ((size, unit) for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)) if count >= 0.9995 * size), (1, "")
    )
    return f"{float(f'{count / size:.3g}'):g}{unit}"


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
    """Where a run, or what changes in one, says how long is trained: `tokens`, `training_args.max_steps`, ...

    transformers counts steps from 1, so a `max_steps` of -1 names none.
    """
    arguments = section.get("training_args")
    named = ["tokens"] if section.get("tokens") is not None else []
    if not isinstance(arguments, Mapping):
        return named
    for key in ("max_steps", "num_train_epochs"):
        value = arguments.get(key)
        if value is not None and not (key == "max_steps" and isinstance(value, int) and value < 0):
            named.append(f"training_args.{key}")
    return named


def check_one_budget(section: Mapping[str, Any]) -> None:
    """Raises `KeyProblem` where a level of the YAML names two budgets."""
    named = budgets(section)
    if len(named) > 1:
        raise KeyProblem(named[0], f"{named[1]} is given too; keep one of the two")


def without_budget(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section without any budget, as something else names one."""
    kept = {key: value for key, value in section.items() if key != "tokens"}
    arguments = kept.get("training_args")
    if isinstance(arguments, Mapping):
        dropped = ("max_steps", "num_train_epochs")
        kept["training_args"] = {key: value for key, value in arguments.items() if key not in dropped}
    return kept
