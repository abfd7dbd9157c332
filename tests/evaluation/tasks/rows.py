"""The rows of the tasks in this folder, wherever lm-eval is started."""

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict


def facts(**kwargs: Any) -> DatasetDict:
    return _rows("facts.jsonl")


def sums(**kwargs: Any) -> DatasetDict:
    return _rows("sums.jsonl")


def _rows(name: str) -> DatasetDict:
    return DatasetDict({"test": Dataset.from_json(str(Path(__file__).parent / name))})
