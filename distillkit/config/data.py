"""`dataset`: training text, and held-out text for evaluation."""

import re
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from distillkit.config.errors import KeyProblem
from distillkit.config.section import PathText, Section

_BOUND = r"(-?\d+%?)?"
_SPLIT = re.compile(rf"\w[\w.\-]*(\[{_BOUND}:{_BOUND}\](\(\w+\))?)?")


class DatasetSource(Section):
    """Where rows come from: a dataset of the hub, or files on disk."""

    repo_id: str | None = Field(None, description="a dataset of the hub, such as allenai/tulu-3-sft-mixture")
    revision: str | None = Field(None, description="branch, tag or commit of repo_id")
    config_name: str | None = Field(None, description="configuration (subset) of repo_id")
    disk_path: PathText | None = Field(
        None,
        description="a save_to_disk folder; or a .parquet, .jsonl, .json or .txt file, a folder, or a pattern",
    )
    split: str | None = Field(None, description="split, or a part of one: train[:1000], train[10%:]+test")

    @field_validator("split")
    @classmethod
    def check_split(cls, split: str | None) -> str | None:
        for part in [] if split is None else split.split("+"):
            if not _SPLIT.fullmatch(part.strip()):
                raise ValueError(f"must be a split such as train, train[:1000] or train[10%:], got {split!r}")
        return split

    @model_validator(mode="after")
    def check_one_source(self) -> Self:
        if self.repo_id is None and self.disk_path is None:
            raise KeyProblem("repo_id", "is missing: give repo_id (a dataset of the hub) or disk_path (local files)")
        if self.disk_path is None:
            return self
        for key in ("repo_id", "revision", "config_name"):
            if getattr(self, key) is not None:
                raise KeyProblem(key, "disk_path is given too; keep one of the two")
        return self


class DatasetConfig(Section):
    """`dataset`: training text and held-out text."""

    train_dataset: DatasetSource = Field(description="training text: repo_id or disk_path")
    eval_dataset: DatasetSource | None = Field(None, description="held-out text: repo_id or disk_path")
    seed: int | None = Field(42, ge=0, description="seed of the shuffling; null keeps the order")
    num_samples: int | None = Field(None, gt=0, description="rows taken from train_dataset; all by default")
    num_eval_samples: int | None = Field(None, gt=0, description="rows taken from eval_dataset; all by default")
    eos_label_token_ids: list[int] | None = Field(
        None, description="token ids that are treated as the end-of-sequence token in labels"
    )
    prepared_dataset_path: PathText | None = Field(
        None, description="folder that stores the prepared rows, to be reused"
    )
    prepacked: bool = Field(False, description="the rows are tokenised and packed already")

    packing: bool = Field(True, description="several documents share a row; none attends to another")
    dataset_text_field: str = Field("text", description="column that holds the text")
    dataset_num_proc: int | None = Field(
        None, gt=0, description="processes that tokenise; by default as many as pay, one per CPU at most"
    )
    assistant_only_loss: bool = Field(False, description="of conversations, only the assistant's messages count")
    completion_only_loss: bool | None = Field(None, description="of prompt and completion, only the latter counts")


TRL_KEYS = ("packing", "dataset_text_field", "dataset_num_proc", "assistant_only_loss", "completion_only_loss")
"""Keys of `dataset` that are also accepted in `training_args`, where published configurations have them."""


def move_dataset_keys(data: Any) -> Any:
    """A run or a phase, as plain data, with those keys in `dataset`; anything that is not a section is not changed."""
    if not isinstance(data, dict) or not isinstance(data.get("training_args"), dict):
        return data
    moved = {key: value for key, value in data["training_args"].items() if key in TRL_KEYS}
    dataset = data.get("dataset", {})
    if not moved or not isinstance(dataset, dict):
        return data
    kept = {key: value for key, value in data["training_args"].items() if key not in TRL_KEYS}
    return {**data, "training_args": kept, "dataset": {**moved, **dataset}}
