"""The YAML of `distillkit write`: a model writes text, from which students of it learn."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from distillkit.config.data import DatasetSource
from distillkit.config.errors import KeyProblem, UserError
from distillkit.config.readiness import check_model_path, check_source
from distillkit.config.section import LoadingArguments, PathText, Section, WholeFile
from distillkit.config.yaml_files import read_changed


class WriterConfig(Section):
    """`teacher`: the model that writes."""

    path: PathText = Field(description="the teacher of the student that will read: a folder, hub id or .gguf file")
    kwargs: LoadingArguments = Field(
        default={}, description="keyword arguments of from_pretrained: dtype, gguf_file, revision, ..."
    )


class WrittenTextConfig(WholeFile):
    """One text: continuations of prompts, or documents that begin with nothing."""

    kind_of_file = "a written text"

    teacher: WriterConfig = Field(description="the model that writes: path")
    trust_remote_code: bool = Field(False, description="run code that comes with the model or its tokenizer")
    prompts: DatasetSource | None = Field(
        None,
        description="what is continued: repo_id or disk_path. Of messages all up to the last answer, of the column "
        "prompt the whole, of a text its first prompt_tokens; without it documents begin with nothing",
    )
    text_field: str = Field("text", description="column of prompts that holds texts")
    prompt_tokens: int = Field(64, gt=0, description="tokens of a text that are continued, its first")
    documents: int = Field(gt=0, description="documents to write; prompts are continued again where they are fewer")
    max_new_tokens: int = Field(512, gt=0, description="tokens that are written at most after a prompt")
    temperatures: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default=[1.0], min_length=1, description="temperatures of the sampling; documents take turns"
    )
    batch_size: int = Field(64, gt=0, description="documents that are written at a time")
    documents_per_file: int = Field(4096, gt=0, description="documents in a file; a kill loses at most one file")
    seed: int = Field(0, ge=0, description="seed of the order of the prompts and of the sampling")
    output_path: PathText = Field(description="new folder for the parquet files; then the disk_path of a dataset")

    @model_validator(mode="after")
    def check_effects(self) -> Self:
        for key in ("text_field", "prompt_tokens"):
            if self.prompts is None and key in self.model_fields_set:
                raise KeyProblem(key, "has an effect on prompts only; give prompts, or remove it")
        return self


def load_written_config(path: Path | None, overrides: Sequence[str] = ()) -> WrittenTextConfig:
    """The text that a YAML file describes, changed by `key=value` overrides, or these alone. Raises `UserError`."""
    return WrittenTextConfig.parse(read_changed(path, overrides))


def check_written_ready(config: WrittenTextConfig) -> None:
    """Raises `UserError` for files that do not exist, and for an output folder that does."""
    check_model_path("teacher.path", config.teacher.path)
    if config.prompts is not None:
        check_source("prompts.disk_path", config.prompts)
    if os.path.exists(config.output_path):
        raise UserError("output_path", f"{config.output_path!r} exists; remove it or name a new folder")
