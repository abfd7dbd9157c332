"""The background of a captured dataset: the teacher's distribution outside its top k, averaged over tokens."""

import hashlib
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from distillkit.config.errors import UserError
from distillkit.runs.writing import sha256, write_whole
from distillkit.shards.files import ShardRecord
from distillkit.shards.manifest import Manifest, read_manifest
from distillkit.shards.names import BACKGROUND
from distillkit.shards.sealed import read_sealed, write_sealed

_TENSOR = "logprobs"
_PLAN = "plan"
_RECORD = Path(BACKGROUND).with_suffix(".json")


def fitted_background(outside: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
    """The log-distribution of the teacher's probability outside its top k.

    outside: that probability, summed over positions. A token that was always among the top k gets a billionth of the
        total: elsewhere in the text it may be outside.
    """
    whole = outside.sum().clamp(min=torch.finfo(torch.float32).tiny)
    return (outside + 1e-9 * whole).log().log_softmax(-1)


def write_background(folder: Path, logprobs: Float[Tensor, " vocab"], plan: str | None = None) -> str:
    """Write a log-distribution over the vocabulary, complete or not at all, and then its record; returns its name.

    plan: SHA-256 of the capture's plan, kept in the record.
    """
    content = save({_TENSOR: logprobs.detach().float().cpu().contiguous()}, None if plan is None else {_PLAN: plan})
    write_whole(folder / BACKGROUND, content)
    record = ShardRecord(BACKGROUND, (0, 0), 0, len(content), hashlib.sha256(content).hexdigest(), plan)
    write_sealed(folder / _RECORD, record)
    return BACKGROUND


def background_is_of(folder: Path, plan: str) -> bool:
    """Whether the folder has a background as it was written with `plan`."""
    try:
        record = read_sealed(folder / _RECORD, ShardRecord)
        return record.plan == plan and sha256(folder / BACKGROUND) == record.sha256
    except FileNotFoundError:
        pass
    except (OSError, ValueError):
        return False
    try:  # captured before there were records of it: the manifest has its digest
        manifest = read_manifest(folder)
        if manifest is None or not manifest.shards or manifest.shards[0].plan != plan:
            return False
        return sha256(folder / BACKGROUND) == manifest.background_sha256
    except (OSError, UserError):
        return False


def read_background(folder: Path, manifest: Manifest | None) -> Float[Tensor, " vocab"] | None:
    """The background of a captured dataset; None where it has none. Raises `UserError` for a damaged file."""
    if manifest is None or manifest.background is None:
        return None
    path = folder / manifest.background
    if path.is_file() and manifest.background_sha256 not in (None, sha256(path)):
        raise UserError(path, "differs from what was captured (SHA-256)")
    logprobs = read_background_file(path)
    if logprobs.shape[0] != manifest.vocabulary_size:
        raise UserError(
            path,
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
