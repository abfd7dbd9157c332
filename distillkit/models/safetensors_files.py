"""The safetensors files of a folder: which there are, and what is in them, read one tensor at a time."""

import json
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError, safe_open

from distillkit.config.errors import UserError

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors files call them."""


def damaged(file: Path, why: object, key: str) -> UserError:
    return UserError(key, f"{str(file)!r} is damaged ({why}); download or save it again")


def safetensors_files(folder: Path, key: str) -> list[Path]:
    """Those that transformers reads: the one file, or the parts in the index, which is a JSON object."""
    one, index = folder / "model.safetensors", folder / INDEX
    if one.exists() or not index.exists():
        return [one] if one.exists() else []
    parts = json.loads(index.read_text("utf-8")).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
        raise damaged(index, "it has no weight_map", key)
    return [folder / name for name in sorted(set(parts.values()))]


def header(file: Path, key: str) -> dict[str, torch.Tensor]:
    """The tensors of a file without their data, which is not read."""
    try:
        with safe_open(file, "np") as opened:  # "pt" would ask for as much memory as the file has bytes
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise damaged(file, error, key) from error
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def read_tensor(file: Path, name: str, rows: range | None = None) -> torch.Tensor:
    """One tensor of a safetensors file, or some rows of it; nothing else is mapped or read."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        described = json.loads(opened.read(length))[name]
        shape, (start, end) = described["shape"], described["data_offsets"]
        if rows is not None:
            row = (end - start) // max(1, shape[0])
            shape, start, end = [len(rows), *shape[1:]], start + row * rows.start, start + row * rows.stop
        opened.seek(8 + length + start)
        data = numpy.fromfile(opened, numpy.uint8, end - start)
    return torch.from_numpy(data).view(DTYPES[described["dtype"]]).reshape(shape)
