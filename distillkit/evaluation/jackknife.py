"""Standard errors of numbers that are computed from sums over documents.

Tokens of a document depend on one another; documents are independent. The delete-one-group jackknife computes the
number without each document in turn, and the standard error from the spread of the results. It holds for means,
perplexities and calibration errors alike (Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 11).
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

Named = dict[str, Float64[Tensor, "*shape"]]


def jackknife(numbers: Callable[[Named], Named], sums: Named) -> tuple[Named, Named]:
    """(values, standard errors) of `numbers`, a function of the totals of `sums`.

    numbers: takes totals [..., *width] by name, and returns numbers [..., *width] by name.
    sums: by name, [documents, *width]: the sum over each document.

    An error is NaN where it is unknown: for fewer than two documents, and where all tokens are in a single one.
    """
    totals = {name: each.sum(0) for name, each in sums.items()}
    values = numbers(totals)
    documents = len(next(iter(sums.values())))
    if documents < 2:
        return values, {name: torch.full_like(value, torch.nan) for name, value in values.items()}
    left_out = numbers({name: totals[name] - each for name, each in sums.items()})
    factor = (documents - 1) / documents
    errors = {name: (factor * (each - each.mean(0)).square().sum(0)).sqrt() for name, each in left_out.items()}
    return values, errors


def with_errors(numbers: Callable[[Named], Named], sums: Named) -> dict[str, Any]:
    """Single numbers as of `jackknife`, and their `standard_errors`, for JSON; None where one is not finite."""
    values, errors = (
        {name: each.item() if each.isfinite() else None for name, each in found.items()}
        for found in jackknife(numbers, sums)
    )
    return {**values, "standard_errors": errors}
