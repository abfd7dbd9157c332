"""A loss of the user's own: `function: my_losses:focal_kl` calls `focal_kl` of the module `my_losses`.

The module is searched on `sys.path` and then in the working directory. Importing it runs its code, with all rights of
the user: name only modules whose code you trust. Nothing is imported but the module that the YAML names.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distillkit.config import LossConfig, UserError
from distillkit.losses.divergences import LossFunction, PerToken


def check_losses(loss_functions: Sequence[LossConfig]) -> None:
    """Raises `UserError` where a loss of the user's own cannot be imported or called."""
    for position, loss in enumerate(loss_functions):
        if loss.is_from_module:
            load_loss(loss, position)


def load_loss(loss: LossConfig, position: int = 0) -> LossFunction:
    """The function `module:function`, whose results are checked. position: of the loss in `loss_functions`.

    Raises `UserError` where the module cannot be imported, and where its function does not take
    (student_logits, teacher, labels) and the options as keyword arguments.
    """
    key = f"loss_functions[{position}]"
    function = getattr(_import(loss.function.partition(":")[0], f"{key}.function"), loss.name, None)
    if not callable(function):
        found = "has no" if function is None else "has no function"
        raise UserError(f"{key}.function", f"the module {found} {loss.name!r}; write one, or correct the name")
    try:
        inspect.signature(function).bind(None, None, None, **(loss.options or {}))
    except (TypeError, ValueError) as error:  # ValueError: of C functions, whose parameters are unknown
        raise UserError(
            f"{key}.options" if loss.options else f"{key}.function",
            f"{loss.name}(student_logits, teacher, labels, **options) cannot be called so: {error}",
        ) from None
    return _checked(function, f"{key}.function")


def _import(module: str, key: str) -> Any:
    """The working directory is searched last, and only now: folders in it may have the names of packages."""
    directory = os.getcwd()
    sys.path.append(directory)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever the user's code raises
        where = " (searched: sys.path, then the working directory)" if isinstance(error, ModuleNotFoundError) else ""
        raise UserError(key, f"cannot import {module!r}: {type(error).__name__}: {error}{where}") from error
    finally:
        sys.path.remove(directory)


def _checked(function: LossFunction, key: str) -> LossFunction:
    """The function with its results checked: a mean, for example, would be counted once for each token."""

    @functools.wraps(function)
    def checked(student_logits: Tensor, teacher: Any, labels: Tensor, **options: Any) -> PerToken:
        result = function(student_logits, teacher, labels, **options)
        expected = student_logits.shape[:1]
        if not isinstance(result, tuple) or len(result) != 2:
            raise UserError(key, "must return two tensors, (sums, counts)")
        for tensor in result:
            if not isinstance(tensor, torch.Tensor) or tensor.shape != expected:
                shape = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise UserError(key, f"sums and counts must have one number per token, {list(expected)}; got {shape}")
        return result

    return checked
