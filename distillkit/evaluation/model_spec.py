"""The models of an evaluation: loaded when they are needed, and known by what their files hold."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
from distillkit.models.vocabulary import TOKENIZER_FILES, has_tokenizer

_OTHER_FILES = ("chat_template*", "special_tokens_map.json", "added_tokens.json", "generation_config.json", "*.py")


@dataclass(frozen=True)
class Subject:
    """A model that is measured: what the YAML says of it."""

    name: str
    config: ModelConfig
    trust_remote_code: bool
    teacher: Subject | None = None
    """Whose tokenizer it has where it comes without one."""

    @property
    def key(self) -> str:
        """Of the YAML, where the model is named."""
        return "teacher.path" if self.name == TEACHER else f"students.{self.name}.path"

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for loading anything of this model."""
        return {"key": self.key, "trust_remote_code": self.trust_remote_code, **where(self.config.kwargs)}

    @cached_property
    def state(self) -> dict[str, Any]:
        """What decides what the model answers, as it was when it was first asked for."""
        return self.state_now()

    def state_now(self) -> dict[str, Any]:
        """What decides what the model answers: digests of its files, or the commit of a hub id."""
        path = Path(self.config.path)
        weights = weights_sha256(self.config.path, self.config.kwargs)
        found: dict[str, Any] = {"weights": weights, "kwargs": self.config.kwargs}
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
        """Its own; the teacher's where a folder has none. Raises `UserError` where there is none at all."""
        if not self._has_tokenizer() and self.teacher is not None:
            return self.teacher.load_tokenizer()
        return load_tokenizer(self.config.path, **self.options)

    def _has_tokenizer(self) -> bool:
        folder = Path(self.config.path)
        return not folder.is_dir() or "gguf_file" in self.config.kwargs or has_tokenizer(folder)

    def load(self, device: torch.device) -> Loaded:
        """The model on the device, in evaluation mode, in the dtype of its checkpoint unless `kwargs` say otherwise.

        Raises `UserError` where its files are no longer those of `state`, under which its results would be kept.
        """
        options = {"trust_remote_code": self.trust_remote_code, **self.config.kwargs}
        model = load_model(self.config.path, key=self.key, **options)
        if self.state_now() != self.state:
            raise UserError(self.key, "its files have changed since the evaluation began; the same command goes on")
        placed = "device_map" in self.config.kwargs
        return Loaded(self, model if placed else model.to(device), self.load_tokenizer(), device, placed)


@dataclass(frozen=True)
class Loaded:
    """A model in memory, and its tokenizer."""

    subject: Subject
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    placed: bool
    """Whether `device_map` has put it where it is."""

    def park(self) -> None:
        """Leave the accelerator to others."""
        if not self.placed and self.device.type != "cpu":
            self.model.to("cpu")
            release_memory()

    def wake(self) -> None:
        """Come back from where `park` has put it."""
        if not self.placed:
            self.model.to(self.device)

    def describe(self) -> dict[str, Any]:
        """What a report says of a model; `trained_length` of the subject comes on top."""
        config = self.model.config.get_text_config()
        return {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "model_type": self.model.config.model_type,
            "layers": getattr(config, "layer_types", None),  # of architectures whose layers differ
            "max_position_embeddings": getattr(config, "max_position_embeddings", None),  # absent without positions
        }


def trained_length(config: ModelConfig, longest: int | None) -> int | None:
    """Tokens that a model was trained on at a time: as the YAML says, as its run says, or `longest`."""
    if config.trained_length is not None:
        return config.trained_length
    folder = Path(config.path)
    for record in (folder / "run.json", folder.parent / "run.json"):
        if record.exists() and (record.parent == folder or folder.name.startswith("checkpoint-")):
            try:
                run = json.loads(record.read_text(encoding="utf-8"))["config"]
                phases = run.get("phases") or [{}]
                return int(phases[-1].get("sequence_length", run["sequence_length"]))
            except (OSError, ValueError, LookupError, TypeError, AttributeError):
                continue  # a run.json that is damaged, or not one of distillkit's
    return longest


def release_memory() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
