"""The background of a captured dataset: the teacher's distribution outside its top k, averaged over tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from distillkit.config.errors import UserError
from distillkit.runs.writing import write_whole
from distillkit.shards.manifest import Manifest
from distillkit.shards.names import BACKGROUND

_TENSOR = "logprobs"
_PLAN = "plan"


def fitted_background(outside: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
    """The log-distribution of the teacher's probability outside its top k.

    outside: that probability, summed over positions. A token that was always among the top k gets a billionth of the
        total: elsewhere in the text it may be outside.
    """
    whole = outside.sum().clamp(min=torch.finfo(torch.float32).tiny)
    return (outside + 1e-9 * whole).log().log_softmax(-1)


def write_background(folder: Path, logprobs: Float[Tensor, " vocab"], plan: str | None = None) -> str:
    """Write a log-distribution over the vocabulary, complete or not at all; returns the file's name.

    plan: SHA-256 of the capture's plan, kept in the file.
    """
    metadata = None if plan is None else {_PLAN: plan}
    write_whole(folder / BACKGROUND, save({_TENSOR: logprobs.detach().float().cpu().contiguous()}, metadata))
    return BACKGROUND


def background_is_of(folder: Path, plan: str) -> bool:
    """Whether the folder has a background that was written with `plan`."""
    try:
        with safe_open(folder / BACKGROUND, "pt") as file:
            return (file.metadata() or {}).get(_PLAN) == plan
    except (OSError, SafetensorError):
        return False


def read_background(folder: Path, manifest: Manifest | None) -> Float[Tensor, " vocab"] | None:
    """The background of a captured dataset; None where it has none. Raises `UserError` for a damaged file."""
    if manifest is None or manifest.background is None:
        return None
    logprobs = read_background_file(folder / manifest.background)
    if logprobs.shape[0] != manifest.vocabulary_size:
        raise UserError(
            f"{folder / manifest.background}",
            f"covers {logprobs.shape[0]} tokens, but the dataset's vocabulary has {manifest.vocabulary_size}",
        )
    return logprobs


def read_background_file(path: Path) -> Float[Tensor, " vocab"]:
    """The background in a file that a capture wrote. Raises `UserError` for any other file."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(path, f"cannot be read as a background distribution: {error}") from error
    logprobs = tensors.get(_TENSOR)
    if logprobs is None or logprobs.dim() != 1 or logprobs.dtype != torch.float32:
        raise UserError(path, f"holds no float32 vector {_TENSOR!r}; name a file that distillkit capture wrote")
    return logprobs
