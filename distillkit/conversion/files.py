"""Safetensors files whose tensors are written one at a time, in any order: no more than one need be in memory."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from distillkit.models.safetensors_files import DTYPES

MAX_SHARD_SIZE = "5GB"
"""As on the hub: to load a file, much of the software maps it into memory whole."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ModelFiles:
    """The weights of a model in a folder, as transformers writes them; all are zero at first.

    Args:
        tensors: the state dict of the model, on the meta device.
        parameters: of the model, for the index.
        max_shard_size: of one file, in bytes or as text; more than one have an index.
    """

    def __init__(
        self, folder: Path, tensors: dict[str, Tensor], parameters: int, max_shard_size: int | str = MAX_SHARD_SIZE
    ) -> None:
        split = split_torch_state_dict_into_shards(
            tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
        self.of = {name: folder / file for name, file in split.tensor_to_filename.items()}
        """The file of each tensor."""
        self._laid_out = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        self._offsets: dict[str, int] = {}
        for file, names in split.filename_to_tensors.items():
            self._offsets |= _lay_out(folder / file, {name: tensors[name] for name in names})
        if split.is_sharded:
            metadata = {"total_parameters": parameters, **split.metadata}
            index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the dtype and shape that were laid out."""
        if (tensor.dtype, tensor.shape) != self._laid_out[name]:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not what was laid out")
        with self.of[name].open("r+b") as file:
            file.seek(self._offsets[name])
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _lay_out(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """A file with a header and room for its tensors; where in it each of them begins."""
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # each begins at a multiple of its item
    ends, end = {}, 0
    for name in order:
        end += tensors[name].nbytes
        ends[name] = end
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, tensor in ((each, tensors[each]) for each in order):
        offsets = [ends[name] - tensor.nbytes, ends[name]]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(8 * math.ceil(len(text) / 8))
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return {name: 8 + len(text) + ends[name] - tensors[name].nbytes for name in order}
