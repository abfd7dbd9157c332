"""A teacher whose linear layers are quantised while it is loaded, by what transformers offers for that; but for float8,
which comes later (`models.float8`).

Embeddings and head stay as they are, so logits have the head's precision. Only a model that is never trained or saved
is loaded so.
"""

from typing import Any

import torch
from transformers import BitsAndBytesConfig

from distillkit.config.teacher import Quantization

BYTES_PER_WEIGHT = {"int8": 1.0, "bitsandbytes_8bit": 1.0, "bitsandbytes_4bit": 0.5}
"""Without the scales, which are some hundredths of that."""


def quantization_arguments(kind: Quantization, dtype: torch.dtype | None, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained`. On CUDA each layer is quantised there as it is read.

    dtype: of the products that bitsandbytes computes with 4-bit weights; by default bfloat16.
    """
    place = {} if device.type == "cpu" else {"device_map": {"": device}}
    return {"quantization_config": _configuration(kind, dtype), **place}


def _configuration(kind: Quantization, dtype: torch.dtype | None) -> Any:
    if kind == "bitsandbytes_8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if kind == "bitsandbytes_4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16 if dtype is None else dtype,
        )
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    # Inductor's configuration would be that of the student's compilation too.
    return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
