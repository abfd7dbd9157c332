"""GGUF files: what transformers does not read of them is read here, or refused.

transformers 5.23 takes one file of a split model for the whole, and knows neither scaled rotary embeddings nor, for
some families, the size of a head.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import cached_file

from distillkit.config.errors import UserError

_DENSE = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures whose files and configurations correspond name by name."""

_ROPE_FACTORS = "rope_freqs.weight"
"""What llama3's scaling divides each frequency by."""

HUB = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "proxies")
"""Keyword arguments of from_pretrained that say how a file is found on the hub."""


def gguf_path(location: str, gguf_file: str, kwargs: dict[str, Any], key: str) -> str:
    """The file on this machine; one of the hub is downloaded as `from_pretrained` with these kwargs would."""
    if os.path.isdir(location):
        return os.path.abspath(os.path.join(location, gguf_file))
    if os.path.isfile(gguf_file):  # transformers would take this one
        raise UserError(key, f"{gguf_file!r} lies in the current folder, too; run in another, or name the file alone")
    return str(cached_file(location, gguf_file, **{name: kwargs[name] for name in HUB if name in kwargs}))


def configuration_changes(path: str, key: str) -> dict[str, Any]:
    """Values of the model's configuration that transformers does not take from the file.

    Raises `UserError` for a file that is damaged, split, or of a model that transformers would make another one of.
    """
    reader = _parsed(path, key)
    name = os.path.basename(path)

    def read(field: str, default: Any = None) -> Any:
        return reader.fields[field].contents() if field in reader.fields else default

    if (parts := read("split.count", 1)) > 1:
        raise UserError(
            key,
            f"{name!r} is one of {parts} parts of a model; make one file of them first: "
            "llama-gguf-split --merge FIRST_PART WHOLE.gguf",
        )
    architecture = read("general.architecture")
    changes: dict[str, Any] = {}
    if architecture in _DENSE:
        heads, width = (read(f"{architecture}.{each}") for each in ("attention.head_count", "embedding_length"))
        size = read(f"{architecture}.attention.key_length", read(f"{architecture}.rope.dimension_count"))
        if size is not None and (architecture == "qwen3" or size != width // heads):
            changes["head_dim"] = size
        rotated = read(f"{architecture}.rope.dimension_count", size)
        if rotated != size:
            raise UserError(key, f"{name!r} rotates {rotated} of a head's {size} numbers, which is not read here")
    rope = _rope(reader, architecture, read)
    if isinstance(rope, str) or (rope and architecture not in _DENSE):
        kind = rope if isinstance(rope, str) else rope["rope_type"]
        raise UserError(
            key, f"{name!r} scales its rotary embedding ({kind}), which is not read here; name the model's safetensors"
        )
    if rope:
        changes["rope_parameters"] = {**rope, "rope_theta": read(f"{architecture}.rope.freq_base", 10000.0)}
    return changes


def _rope(reader: Any, architecture: str, read: Any) -> dict[str, Any] | str:
    """`rope_parameters` of transformers without the base; empty where nothing is scaled, text where that is unknown."""
    prefix = f"{architecture}.rope.scaling."
    scaling = {field.removeprefix(prefix): read(field) for field in reader.fields if field.startswith(prefix)}
    kind = scaling.pop("type", "linear")
    factor = scaling.pop("factor", read(f"{architecture}.rope.scale_linear", 0.0)) or 1.0
    context = read(f"{architecture}.context_length")
    original = scaling.pop("original_context_length", context)
    scaling.pop("finetuned", None)
    tensors = {tensor.name: tensor for tensor in reader.tensors if tensor.name.startswith("rope_")}
    factors = tensors.pop(_ROPE_FACTORS, None)
    if strange := [*(each for each, value in scaling.items() if value != 1.0), *tensors]:
        return ", ".join(strange)
    if kind == "none" or factor == 1.0:
        return {} if factors is None else _divided(factors, context)
    if factors is not None:
        return f"{kind}, {_ROPE_FACTORS}"
    if kind == "yarn":
        return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
    return {"rope_type": kind, "factor": factor} if kind == "linear" else str(kind)


def _divided(factors: Any, context: int) -> dict[str, Any]:
    """Each frequency divided by a factor of its own: longrope of transformers, alike for long and short texts."""
    from gguf import dequantize

    each = dequantize(factors.data, factors.tensor_type).tolist()
    return {
        "rope_type": "longrope",
        "short_factor": each,
        "long_factor": each,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }


def unread_tensors(model: PreTrainedModel, path: str, key: str) -> list[str]:
    """Names of the file's tensors that are no parameter of the loaded model, where the two correspond name by name."""
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    if model.config.model_type not in _DENSE:
        return []
    known = {_ROPE_FACTORS, *get_gguf_hf_weights_map(model, TensorProcessor())}
    return [tensor.name for tensor in _parsed(path, key).tensors if tensor.name not in known]


def _parsed(path: str, key: str) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError(key, f"GGUF files need the package gguf: {error}") from error
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # any, for a damaged file sends the reader anywhere
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(
                    key, f"{path!r} is no GGUF file: it does not start with the GGUF magic bytes"
                ) from error
        raise UserError(key, f"{path!r} is not a whole GGUF file: {error}") from error
    expected = reader.data_offset
    for tensor in reader.tensors:  # of another type or size in the header, numbers of its neighbours would be read
        if tensor.data_offset != expected:
            raise UserError(
                key, f"{path!r} is not a whole GGUF file: the numbers of {tensor.name} begin too early or late"
            )
        expected += int(tensor.n_bytes) + -int(tensor.n_bytes) % reader.alignment
    return reader


@contextmanager
def gguf_parsed_once() -> Iterator[None]:
    """Within it, a GGUF file is parsed once, and the table of tensor names is made once.

    transformers 5.23 parses the file for the configuration and again for the weights, and makes the table for each
    module of the model: 16 s for SmolLM2-135M, of which 5 s remain. Both depend on their arguments alone. Around
    several loads, of a model and its tokenizer, it is parsed once for all of them.
    """
    try:
        import gguf
    except ImportError:  # only needed for GGUF files
        yield
        return
    slow = {"GGUFReader": gguf.GGUFReader, "get_tensor_name_map": gguf.get_tensor_name_map}
    vars(gguf).update({name: functools.cache(function) for name, function in slow.items()})
    try:
        yield
    finally:
        vars(gguf).update(slow)
