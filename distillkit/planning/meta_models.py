"""The models of a run on the meta device: their shapes, from configurations and the headers of weight files alone."""

import copy
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from distillkit.config import HFTeacherConfig, RunConfig, UserError
from distillkit.conversion.convert import check_teacher, student_on_meta
from distillkit.models.loading import as_user_error, check_headers, load_pretrained_config, where
from distillkit.student.mixers.names import FULL, name_of


@contextmanager
def transformers_silenced() -> Iterator[None]:
    """For a plan: the run itself prints what transformers warns of."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def read_config(path: str, key: str, kwargs: dict[str, Any], trust_remote_code: bool) -> PreTrainedConfig:
    """A model's configuration. Raises `UserError` where it cannot be read, and says what would do instead."""
    try:
        return load_pretrained_config(path, key=key, trust_remote_code=trust_remote_code, **where(kwargs))
    except UserError as error:
        if os.path.isdir(os.path.expanduser(path)):
            raise
        raise UserError(
            error.key, f"{error.problem}; to plan without the hub, name a local folder that has the config.json"
        ) from error


def teacher_on_meta(config: PreTrainedConfig, teacher: HFTeacherConfig, trust_remote_code: bool) -> PreTrainedModel:
    """The teacher in the dtype that it is loaded in."""
    given = teacher.kwargs.get("dtype", teacher.kwargs.get("torch_dtype", "auto"))
    dtype = given if isinstance(given, torch.dtype) else vars(torch).get(str(given).removeprefix("torch."))
    if not isinstance(dtype, torch.dtype):  # auto: the checkpoint's
        quantised = teacher.path.endswith(".gguf") or "gguf_file" in teacher.kwargs
        dtype = torch.float32 if quantised else config.dtype or torch.float32
    model = _on_meta(config, dtype, trust_remote_code, teacher.path, "teacher.path")
    return model.eval().requires_grad_(False)


def student_config(run: RunConfig, teacher: PreTrainedConfig | None) -> PreTrainedConfig:
    """The configuration of the student that a run starts with, converted or not."""
    if run.student is None:
        assert run.model is not None
        return read_config(run.model, "model", run.model_kwargs, run.trust_remote_code)
    assert teacher is not None and isinstance(run.teacher, HFTeacherConfig)
    on_meta = _on_meta(teacher, torch.float32, run.trust_remote_code, run.teacher.path, "teacher.path")
    check_teacher(on_meta, run.student)
    return student_on_meta(_sdpa(copy.deepcopy(teacher)), run.student).config


def student_model(run: RunConfig, config: PreTrainedConfig) -> PreTrainedModel:
    """The student in float32 and not frozen, its embeddings grown as the run asks."""
    config = copy.deepcopy(config)
    multiple = run.resize_embeddings_to_multiple_of or 1
    rows: int = config.vocab_size
    config.vocab_size = rows + -rows % multiple
    return _on_meta(config, torch.float32, run.trust_remote_code, str(run.model), "model")


def parameter_groups(model: PreTrainedModel, trained: list[nn.Parameter]) -> dict[str, tuple[int, int]]:
    """(all, trained) parameters of each part of a model; a tensor that has two names is counted once."""
    ids = {id(parameter) for parameter in trained}
    totals: Counter[str] = Counter()
    of_trained: Counter[str] = Counter()
    mixers = getattr(model.config, "mixers", None) or []
    labels = {f".layers.{index}.self_attn.": name_of(mixer).label for index, mixer in enumerate(mixers)}
    for name, parameter in model.named_parameters():
        group = _group(name, labels)
        totals[group] += parameter.numel()
        of_trained[group] += parameter.numel() if id(parameter) in ids else 0
    order = [*dict.fromkeys([*labels.values(), *GROUPS])]
    return {group: (totals[group], of_trained[group]) for group in order if totals[group]}


GROUPS = (name_of(FULL).label, "MLP", "embeddings and head", "norms", "other")


def _group(name: str, labels: Mapping[str, str]) -> str:
    """labels: what tables call the mixer of each layer, by a part of its parameters' names."""
    attention, mlp, embeddings, norms, other = GROUPS
    if (label := next((label for part, label in labels.items() if part in name), None)) is not None:
        return label
    if ".self_attn." in name:
        return attention
    if ".mlp." in name:
        return mlp
    if "embed" in name or name.startswith("lm_head"):
        return embeddings
    return norms if "norm" in name else other


def check_files(path: str, key: str, config: PreTrainedConfig, kwargs: dict[str, Any], trust_remote_code: bool) -> None:
    """Raises `UserError` where a local folder holds other weights than its configuration describes."""
    unknown = where(kwargs) or getattr(config, "quantization_config", None) is not None
    if not unknown and os.path.isdir(os.path.expanduser(path)):
        check_headers(_on_meta(config, torch.float32, trust_remote_code, path, key), path, key)


def _sdpa(config: PreTrainedConfig) -> PreTrainedConfig:
    """Flash attention is not asked for by a plan: neither the package nor the device need be here."""
    config._attn_implementation = "sdpa"
    vars(config).pop("quantization_config", None)
    return config


def _on_meta(
    config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool, path: str, key: str
) -> PreTrainedModel:
    """Raises `UserError` where no model can be built from the configuration, which `path` under `key` named."""
    with as_user_error(os.path.expanduser(path), key), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            _sdpa(copy.deepcopy(config)), dtype=dtype, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    return model
