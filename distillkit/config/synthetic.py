"""The YAML of `distillkit synthesize`: which text is rewritten, and how, so that a model learns to retrieve from it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from distillkit.config.data import DatasetSource
from distillkit.config.errors import KeyProblem, UserError
from distillkit.config.readiness import check_model_path, check_source
from distillkit.config.section import PathText, Section, WholeFile
from distillkit.config.yaml_files import read_changed


class TokenizerConfig(Section):
    """`tokenizer`: the tokenizer of the teacher that the student will learn from."""

    path: PathText = Field(
        description="the teacher, of which only the tokenizer is read: a folder, hub id or .gguf file"
    )
    gguf_file: str | None = Field(None, description="name of the GGUF file in that folder")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")


class RepeatedPassagesConfig(Section):
    """`repeated_passages`: documents in which passages return word for word."""

    share: float = Field(gt=0, le=1, description="share of the documents that are rewritten so")
    entries: bool = Field(False, description="add lines that give some words a number, and that return too")


class QuestionsAboutFactsConfig(Section):
    """`questions_about_facts`: documents that state facts and ask for each of them twice, later."""

    share: float = Field(gt=0, le=1, description="share of the documents that are rewritten so")


class AddedTextConfig(DatasetSource):
    """`added`: documents of another text, such as one that the teacher wrote."""

    share: float = Field(gt=0, lt=1, description="share of all tokens that come from it; its first documents are taken")


class SyntheticTextConfig(WholeFile):
    """One text. The documents that no section rewrites stay as they are."""

    kind_of_file = "a synthetic text"

    tokenizer: TokenizerConfig = Field(description="the teacher's tokenizer: path")
    trust_remote_code: bool = Field(False, description="run code that comes with the tokenizer")
    dataset: DatasetSource = Field(description="the text: repo_id or disk_path")
    num_proc: int | None = Field(None, gt=0, description="processes that tokenise")
    output_path: PathText = Field(description="new folder for the parquet files; then the disk_path of a dataset")
    repeated_passages: RepeatedPassagesConfig | None = Field(None, description="let passages return word for word")
    questions_about_facts: QuestionsAboutFactsConfig | None = Field(None, description="state facts and ask for them")
    added: AddedTextConfig | None = Field(
        None, description="documents of another text: repo_id or disk_path, and share"
    )
    document_length: int | None = Field(
        None, gt=0, description="tokens of each rewritten document: short ones are joined, long ones cut; as they are"
    )
    seed: int = Field(0, ge=0, description="seed of the choice of documents and of what is inserted")
    max_file_mib: float = Field(1024.0, gt=0, description="a text that takes more is written in several files")

    @model_validator(mode="after")
    def check_shares(self) -> Self:
        """Shares of the same documents, and nothing without effect."""
        sections = [each for each in (self.repeated_passages, self.questions_about_facts) if each is not None]
        total = sum(section.share for section in sections)
        if total > 1:
            problem = f"with repeated_passages.share it takes {total:g} of the documents; the two may take 1 together"
            raise KeyProblem("questions_about_facts.share", problem)
        for key in ("document_length", "seed"):
            if key in self.model_fields_set and getattr(self, key) is not None and not sections:
                remedy = "give repeated_passages or questions_about_facts, or remove it"
                raise KeyProblem(key, f"has an effect on rewritten documents only; {remedy}")
        return self


def load_synthetic_config(path: Path | None, overrides: Sequence[str] = ()) -> SyntheticTextConfig:
    """The text that a YAML file describes, changed by `key=value` overrides, or these alone. Raises `UserError`."""
    return SyntheticTextConfig.parse(read_changed(path, overrides))


def check_synthetic_ready(config: SyntheticTextConfig) -> None:
    """Raises `UserError` for files that do not exist, and for an output folder that does."""
    check_model_path("tokenizer.path", config.tokenizer.path)
    check_source("dataset.disk_path", config.dataset)
    if config.added is not None:
        check_source("added.disk_path", config.added)
    if os.path.exists(config.output_path):
        raise UserError("output_path", f"{config.output_path!r} exists; remove it or name a new folder")
