"""What autocast does on CUDA and not on a CPU, where a step is simulated."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

IN_FLOAT32 = {
    *(torch.square, torch.pow, torch.rsqrt, torch.exp, torch.sum, torch.norm, torch.softmax, torch.log_softmax),
    *(Tensor.square, Tensor.pow, Tensor.__pow__, Tensor.rsqrt, Tensor.exp, Tensor.sum, Tensor.norm, Tensor.softmax),
    *(F.softplus, F.softmax, F.log_softmax, F.layer_norm, F.cosine_similarity),
}
"""Of what decoders call, that which autocast on CUDA computes in float32 (docs.pytorch.org, "CUDA Op-Specific
Behavior"). ReLU², for one, squares in float32 there: four bytes for each of an MLP's channels that the CPU does not
take."""


class CudaAutocast(TorchFunctionMode):
    """Within, where autocast is on for the CPU, these operations are in float32 as on CUDA."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_wide, (args, kwargs))
        return func(*args, **kwargs)


def _wide(value: Any) -> Any:
    narrow = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if narrow else value
