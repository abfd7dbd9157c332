"""The YAML of `distillkit capture`: which teacher's outputs for which text are stored, and in which format."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from distillkit.config.compression import LegacyLogitCompressionConfig, LogprobCompressorConfig, PlainConfig
from distillkit.config.data import DatasetConfig
from distillkit.config.errors import KeyProblem, UserError
from distillkit.config.readiness import check_model_path, check_source
from distillkit.config.resolve import Run, load_run
from distillkit.config.section import PathText, Section, WholeFile
from distillkit.config.teacher import HFTeacherConfig
from distillkit.config.yaml_files import read_changed, read_yaml

_MOST_BYTES = 2**31 - 1
_FORMATS = ("logprob_compressor", "legacy_logit_compression", "plain")


class CompressionConfig(Section):
    """`compression`: how outputs are stored, in one of three formats."""

    logprob_compressor: LogprobCompressorConfig | None = Field(
        None, description="few bytes per token; the usual format"
    )
    legacy_logit_compression: LegacyLogitCompressionConfig | None = Field(None, description="the older format")
    plain: PlainConfig | None = Field(None, description="ids and log-probabilities as they are")

    @property
    def kind(self) -> str:
        return next(name for name in _FORMATS if getattr(self, name) is not None)

    @property
    def config(self) -> LogprobCompressorConfig | LegacyLogitCompressionConfig | PlainConfig:
        found: LogprobCompressorConfig | LegacyLogitCompressionConfig | PlainConfig = getattr(self, self.kind)
        return found

    @property
    def vocabulary_key(self) -> str:
        """The key of the format that holds the size of the teacher's vocabulary."""
        return "d" if self.kind == "logprob_compressor" else "vocab_size"

    @model_validator(mode="after")
    def check_one_format(self) -> Self:
        given = [name for name in _FORMATS if getattr(self, name) is not None]
        if not given:
            raise KeyProblem(_FORMATS[0], f"is missing: give one of {', '.join(_FORMATS)} with its keys")
        if len(given) > 1:
            raise KeyProblem(given[1], f"{given[0]} is given too; keep one of the two")
        return self


class CaptureConfig(WholeFile):
    """One capture."""

    kind_of_file = "a capture"

    teacher: HFTeacherConfig = Field(description="the teacher: path, and kwargs of from_pretrained")
    trust_remote_code: bool = Field(False, description="run code that comes with the teacher or tokenizer")
    engine: Literal["transformers", "vllm"] = Field("transformers", description="what runs the teacher")
    sequence_length: int = Field(gt=0, description="tokens per row; longer documents are split")
    dataset: DatasetConfig = Field(description="the text: train_dataset is what is captured")
    compression: CompressionConfig = Field(description="the format of the outputs: one of three, with its keys")
    output_path: PathText = Field(description="folder for the captured dataset")
    tokens_per_batch: int = Field(16384, gt=0, description="tokens per batch of the teacher, with padding")
    rows_per_shard: int = Field(
        256, gt=0, description="rows in a file; a capture that is killed loses at most one file"
    )

    @model_validator(mode="after")
    def check_effects(self) -> Self:
        """Refuse keys that would have no effect."""
        if self.teacher.top_k is not None:
            key = f"compression.{self.compression.kind}.k"
            raise KeyProblem("teacher.top_k", f"{key} says how many tokens are kept; remove it")
        if self.teacher.background is not None:
            raise KeyProblem("teacher.background", "has no effect on a capture; remove it")
        if self.teacher.quantization is not None:
            remedy = "remove it; vLLM quantises by teacher.kwargs.quantization"
            raise KeyProblem("teacher.quantization", f"a capture stores the outputs of the whole teacher; {remedy}")
        for key in ("offload", "devices"):
            if getattr(self.teacher, key) is not None:
                raise KeyProblem(f"teacher.{key}", "is for runs; for a capture give teacher.kwargs.device_map: auto")
        for key in ("eval_dataset", "num_eval_samples"):
            if getattr(self.dataset, key) is not None:
                remedy = "only train_dataset is captured; capture held-out text separately, or remove it"
                raise KeyProblem(f"dataset.{key}", remedy)
        return self


def load_capture_config(path: Path, overrides: Sequence[str] = ()) -> CaptureConfig:
    """The capture that a YAML file describes, changed by `key=value` overrides. Raises `UserError`."""
    return CaptureConfig.parse(read_changed(path, overrides))


def load_run_or_capture(path: Path, overrides: Sequence[str] = ()) -> Run | CaptureConfig:
    """As `load_run` or `load_capture_config`: only the YAML of a capture has a section `compression`."""
    return (load_capture_config if "compression" in read_yaml(path) else load_run)(path, overrides)


def check_capture_ready(config: CaptureConfig) -> None:
    """Raises `UserError` where the capture could not start: files that do not exist."""
    check_model_path("teacher.path", config.teacher.path)
    check_source("dataset.train_dataset.disk_path", config.dataset.train_dataset)
    if os.path.exists(config.output_path) and not os.path.isdir(config.output_path):
        raise UserError("output_path", f"{config.output_path!r} is a file; name a folder")


def check_shard_size(config: CaptureConfig, bytes_per_token: int) -> None:
    """Raises `UserError` where the values of a shard are too many for the lists of a parquet file."""
    most_rows = _MOST_BYTES // (bytes_per_token * config.sequence_length)
    if config.rows_per_shard > most_rows:
        raise UserError(
            "rows_per_shard",
            f"{config.rows_per_shard} rows of {config.sequence_length} tokens and {bytes_per_token} "
            f"bytes each are more than a file holds (2 GiB); at most {most_rows}",
        )
