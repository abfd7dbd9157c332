"""The rows of the tasks in this folder, wherever lm-eval is started."""

from pathlib import Path
from typing import Any
from zlib import crc32

from datasets import Dataset, DatasetDict


def facts(**kwargs: Any) -> DatasetDict:
    return _rows("facts.jsonl")


def sums(**kwargs: Any) -> DatasetDict:
    return _rows("sums.jsonl")


def fingerprint(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """A number from 0 to 1 that is another one for another text."""
    return {"fingerprint": crc32(results[0].encode()) / 2**32}


def _rows(name: str) -> DatasetDict:
    return DatasetDict({"test": Dataset.from_json(str(Path(__file__).parent / name))})
