"""NaN and infinity in the weights of a model."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

_EXAMPLES = 3
HALF = "float16 ends at 65504; load it in bfloat16 or float32 (dtype)"


def first_names(names: list[str]) -> str:
    """`a, b, c, ...`: the first of them."""
    return ", ".join(names[:_EXAMPLES]) + (", ..." if len(names) > _EXAMPLES else "")


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, in one pass and without a copy. What has no data, or is quantised, is."""
    wrapper: Any = tensor
    if is_traceable_wrapper_subclass(wrapper):  # of quantised weights the scales
        return all(is_finite(getattr(wrapper, name)) for name in wrapper.__tensor_flatten__()[0])
    if not tensor.is_floating_point() or tensor.itemsize == 1 or tensor.is_meta or tensor.numel() == 0:
        return True
    return bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


def weights_problem(model: PreTrainedModel) -> str | None:
    """Which parameters are not finite, and why that may be; None where all are."""
    names = [name for name, parameter in model.named_parameters() if not is_finite(parameter)]
    return not_finite(names, model.get_parameter(names[0]).dtype) if names else None


def not_finite(names: list[str], dtype: torch.dtype) -> str:
    """The message about tensors that are not finite."""
    hint = f"; {HALF}" if dtype == torch.float16 else ""
    return f"{len(names)} of its tensors hold NaN or infinity ({first_names(names)}){hint}"
