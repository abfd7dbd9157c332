"""The models of an evaluation: loaded when they are needed, or served; identified by digests of their files."""

from __future__ import annotations

import gc
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from distillkit.config.errors import UserError
from distillkit.config.evaluate import TEACHER, ModelConfig
from distillkit.models.loading import (
    files_sha256,
    load_model,
    load_pretrained_config,
    load_tokenizer,
    weights_sha256,
    where,
)
from distillkit.models.server import ServedModel, Server, connect
from distillkit.models.vocabulary import TOKENIZER_FILES, has_tokenizer
from distillkit.runs.names import CHECKPOINT
from distillkit.runs.record import read_record
from distillkit.runs.secrets import leave_out_secrets

_OTHER_FILES = ("chat_template*", "special_tokens_map.json", "added_tokens.json", "generation_config.json", "*.py")


@dataclass(frozen=True)
class ModelSpec:
    """A model to be measured, as the YAML names it."""

    name: str
    config: ModelConfig
    trust_remote_code: bool
    teacher: ModelSpec | None = None
    """Its tokenizer is used where the model has none."""

    @property
    def key(self) -> str:
        """The key of the YAML that names the model."""
        return "teacher.path" if self.name == TEACHER else f"students.{self.name}.path"

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for loading configuration and tokenizer."""
        return {"key": self.key, "trust_remote_code": self.trust_remote_code, **where(self.config.kwargs)}

    @cached_property
    def state(self) -> dict[str, Any]:
        """`current_state` when it was first read."""
        return self.current_state()

    def current_state(self) -> dict[str, Any]:
        """Everything that decides the model's outputs: digests of its files, or the commit of a hub id."""
        path = Path(self.config.path)
        weights = weights_sha256(self.config.path, self.config.kwargs)
        found: dict[str, Any] = {"weights": weights, "kwargs": leave_out_secrets(self.config.kwargs)}
        if weights is None:
            commit = vars(load_pretrained_config(self.config.path, **self.options)).get("_commit_hash")
            return {**found, "path": self.config.path, "commit": commit}
        if path.is_dir():
            patterns = (*TOKENIZER_FILES, *_OTHER_FILES)
            files = {file for pattern in patterns for file in path.glob(pattern) if file.is_file()}
            found["files"] = files_sha256(sorted(files))
        if not self._has_tokenizer() and self.teacher is not None:
            found["tokenizer"] = self.teacher.state
        return found

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own, or the teacher's for a folder without one. Raises `UserError` where there is none."""
        if not self._has_tokenizer() and self.teacher is not None:
            return self.teacher.load_tokenizer()
        return load_tokenizer(self.config.path, **self.options)

    def _has_tokenizer(self) -> bool:
        folder = Path(self.config.path)
        return not folder.is_dir() or "gguf_file" in self.config.kwargs or has_tokenizer(folder)

    @cached_property
    def served(self) -> ServedModel | None:
        """The model as its server gives it; None without a server. Raises `UserError` where the server does not."""
        if self.config.server is None:
            return None
        server = Server(f"{self.key.removesuffix('.path')}.server", self.config.server)
        return connect(server, self.config.path, self.state["weights"], self.load_tokenizer())

    def without_weights(self) -> LoadedModel:
        """What is known of a model that only its server has in memory."""
        config = load_pretrained_config(self.config.path, **self.options)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=self.trust_remote_code)
        return LoadedModel(self, model, self.load_tokenizer(), torch.device("meta"), placed=True)

    def load(self, device: torch.device) -> LoadedModel:
        """The model on the device, in evaluation mode, in the dtype of its checkpoint unless `kwargs` name another.

        Raises `UserError` where its files have changed since `state` was read, under which results are stored.
        """
        options = {"trust_remote_code": self.trust_remote_code, **self.config.kwargs}
        model = load_model(self.config.path, key=self.key, **options)
        if self.current_state() != self.state:
            raise UserError(self.key, "its files have changed since the evaluation began; run the same command again")
        placed = "device_map" in self.config.kwargs
        return LoadedModel(self, model if placed else model.to(device), self.load_tokenizer(), device, placed)


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, and its tokenizer."""

    spec: ModelSpec
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    placed: bool
    """Whether `device_map` chose its devices; it is not moved then."""
    written: dict[Hashable, Any] = field(default_factory=dict)
    """What the teacher has written, by prompts, so that it writes once for all students."""

    def offload(self) -> None:
        """Move it to the CPU, to free the accelerator."""
        if not self.placed and self.device.type != "cpu":
            self.model.to("cpu")
            release_memory()

    def reload(self) -> None:
        """Move it back after `offload`."""
        if not self.placed:
            self.model.to(self.device)

    def describe(self) -> dict[str, Any]:
        """Facts of the model for a report, besides its `trained_length`."""
        config = self.model.config.get_text_config()
        return {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "model_type": self.model.config.model_type,
            "layers": getattr(config, "mixers", None) or getattr(config, "layer_types", None),  # where layers differ
            "max_position_embeddings": getattr(config, "max_position_embeddings", None),  # missing without positions
        }


def trained_length(config: ModelConfig, longest: int | None) -> int | None:
    """Sequence length of a model's training: from the YAML, else from its run, else `longest`."""
    if config.trained_length is not None:
        return config.trained_length
    folder = Path(config.path)
    for run in (folder, folder.parent) if folder.name.startswith(CHECKPOINT) else (folder,):
        # The record may be damaged, or a file of another program.
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, UserError):
            if record := read_record(run):
                phases = record.config.get("phases") or [{}]
                return int(phases[-1].get("sequence_length", record.config["sequence_length"]))
    return longest


def release_memory() -> None:
    """Free what is no longer referenced."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
