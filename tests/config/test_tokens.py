"""A budget: tokens as people write them, and never two of tokens, steps and epochs."""

from typing import Any

import pytest

from distillkit.config import RunConfig, UserError
from distillkit.formatting import token_text

RUN: dict[str, Any] = {
    "model": "org/student",
    "output_path": "out",
    "sequence_length": 512,
    "dataset": {"train_dataset": {"repo_id": "org/text"}},
    "teacher": {"kind": "hf", "path": "org/teacher"},
}


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        (300_000_000, 300_000_000),
        ("300M", 300_000_000),
        ("1.5B", 1_500_000_000),
        ("20k", 20_000),
        ("20K", 20_000),
        ("1 b", 1_000_000_000),
        ("0.3k", 300),
        ("1_000", 1000),
        (3e8, 300_000_000),
        (None, None),
    ],
)
def test_tokens_as_people_write_them(given: Any, tokens: int | None) -> None:
    assert RunConfig.parse({**RUN, "tokens": given}).tokens == tokens


@pytest.mark.parametrize(
    "given", ["300X", "M", "", "1.0005k", "-3M", "1e9", 1.5, True, float("inf"), float("nan"), [1]]
)
def test_what_is_no_number_of_tokens(given: Any) -> None:
    with pytest.raises(UserError, match=r"^tokens: must be a whole number of tokens, such as 300000000, 300M, 1.5B or"):
        RunConfig.parse({**RUN, "tokens": given})


@pytest.mark.parametrize("given", [0, -5, "0M"])
def test_a_budget_is_not_empty(given: Any) -> None:
    with pytest.raises(UserError, match=r"^tokens: must be > 0, got "):
        RunConfig.parse({**RUN, "tokens": given})


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"tokens": 9, "training_args": {"max_steps": 9}},
            "tokens: training_args.max_steps is given too; keep one of the two",
        ),
        (
            {"tokens": 9, "training_args": {"num_train_epochs": 1}},
            "tokens: training_args.num_train_epochs is given too; keep one of the two",
        ),
        (
            {"training_args": {"max_steps": 9, "num_train_epochs": 1}},
            "training_args.max_steps: training_args.num_train_epochs is given too; keep one of the two",
        ),
    ],
)
def test_two_budgets_are_one_too_many(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        RunConfig.parse({**RUN, **changes})
    assert str(caught.value) == line


def test_steps_below_none_are_no_budget() -> None:
    assert RunConfig.parse({**RUN, "tokens": 9, "training_args": {"max_steps": -1}}).tokens == 9


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1k"),
        (36_525, "36.5k"),
        (999_999, "1M"),
        (300_000_000, "300M"),
        (1_500_000_000, "1.5B"),
        (12_345_678_901, "12.3B"),
        (1_000_000_000_000, "1000B"),
    ],
)
def test_numbers_of_tokens_in_print(count: int, text: str) -> None:
    assert token_text(count) == text
