"""`plan.json`: what a capture will store, decided before it begins.

The plan fixes what each shard will hold, so that processes without communication, and those that are started after a
kill, make parts of one dataset. A folder belongs to its plan; another capture is refused there.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from distillkit.compression import Codec
from distillkit.config.capture import CaptureConfig
from distillkit.config.errors import UserError, shown
from distillkit.data import tokenizer_hash
from distillkit.models.labels import IGNORED_LABEL
from distillkit.runs.provenance import installed
from distillkit.runs.secrets import HIDDEN, without_secrets
from distillkit.runs.writing import sha256, write_first
from distillkit.shards import Manifest, ShardRecord
from distillkit.shards.names import PLAN
from distillkit.shards.sealed import read_sealed, write_sealed

FORMAT = 1
"""Version of the file, increased when its meaning changes."""

NOT_IN_CAPTURE: Any = {
    "teacher": True,
    "compression": True,
    "output_path": True,
    "dataset": {"prepared_dataset_path", "dataset_num_proc"},
}
"""Keys that are elsewhere in the plan, or that do not change what is captured."""

NOT_BINDING = ("tokens_per_batch", "trust_remote_code", "dataset.train_dataset.disk_path")
"""Keys that may change before a capture is complete. The digest of the rows shows whether the text is the same; another
batch size may change the last bits."""


@dataclass(frozen=True)
class Plan:
    """Everything that decides the files of a dataset, as it is after a round trip through JSON."""

    teacher: dict[str, Any]
    codec: dict[str, Any]
    capture: dict[str, Any]
    tokenizer_sha256: str
    vocabulary_size: int
    rows_sha256: str
    labels: bool
    """Whether labels are stored: only where they do not follow from the tokens."""
    background: bool
    shards: list[list[int]]
    """First and last (exclusive) row of each."""
    tokens: list[int]
    """Tokens of each shard."""
    versions: dict[str, str]
    format: int = FORMAT

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of what must not change: the same for the same capture in another place or by another version."""
        text = [self.tokenizer_sha256, self.rows_sha256, self.shards]
        content = [self.format, _binding(self), self.vocabulary_size, *text]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def manifest(
        self, records: list[ShardRecord], background: Path | None, tokenizer_files: dict[str, str]
    ) -> Manifest:
        """The manifest of the complete dataset."""
        capture = {**self.capture, "rows_sha256": self.rows_sha256}
        return Manifest(
            codec_kind=self.codec["kind"],
            codec_config=self.codec["config"],
            tokenizer_sha256=self.tokenizer_sha256,
            vocabulary_size=self.vocabulary_size,
            teacher=self.teacher,
            capture=capture,
            versions=self.versions,
            shards=tuple(records),
            background=None if background is None else background.name,
            background_sha256=None if background is None else sha256(background),
            tokenizer_files=tokenizer_files,
            packed_to=capture["sequence_length"] if capture["dataset"]["packing"] else None,
        )


def make_plan(
    config: CaptureConfig, codec: Codec, described: dict[str, Any], rows: Dataset, vocabulary_size: int
) -> Plan:
    """The plan of a capture of `rows`, which are read once. described: by `described_without_rows`."""
    digest, labels, lengths = _scan(rows)
    starts = range(0, len(rows), config.rows_per_shard)
    plan = Plan(
        **described,
        rows_sha256=digest,
        labels=labels,
        background=config.engine == "transformers" and codec.k < vocabulary_size,
        shards=[[start, min(start + config.rows_per_shard, len(rows))] for start in starts],
        tokens=[sum(lengths[start : start + config.rows_per_shard]) for start in starts],
        versions=installed("distillkit", "torch", "transformers", "pyarrow", "vllm"),
    )
    return Plan(**json.loads(json.dumps(asdict(plan))))


def refuse_other_capture(folder: Path, described: dict[str, Any]) -> None:
    """Raises `UserError` where another capture was begun in the folder, as far as that shows without the rows."""
    if (folder / PLAN).exists():
        begun = _read(folder / PLAN)
        _refuse_differences(folder, replace(begun, **described), begun)


def described_without_rows(
    config: CaptureConfig,
    codec: Codec,
    teacher: PreTrainedConfig,
    weights: str | None,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary_size: int,
) -> dict[str, Any]:
    """The fields of a plan that do not depend on rows, as they are after a round trip through JSON.

    weights: SHA-256 of a local teacher's weights, which may be overwritten under the same name.
    """
    described = {
        "teacher": {
            **without_secrets(config.teacher.model_dump(mode="json", include={"path", "kwargs"})),
            "architecture": (teacher.architectures or [type(teacher).__name__])[0],
            "commit": vars(teacher).get("_commit_hash"),  # of a hub id
            "weights_sha256": weights,
        },
        "codec": {"kind": codec.kind, "config": codec.config.model_dump(mode="json")},
        "capture": without_secrets(config.model_dump(mode="json", exclude=NOT_IN_CAPTURE)),
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "vocabulary_size": vocabulary_size,
    }
    restored: dict[str, Any] = json.loads(json.dumps(described))
    return restored


def settle_plan(folder: Path, plan: Plan) -> Plan:
    """The plan in the folder; `plan` is written there if there is none.

    Raises `UserError` where the folder has a plan of another capture, or files that belong to no capture.
    """
    path = folder / PLAN
    if not path.exists():
        patterns = ("*.parquet", "*.safetensors", "*.json")
        foreign = sorted({each.name for pattern in patterns for each in folder.glob(pattern)} - {PLAN})
        if foreign and not path.exists():  # another process may have written the plan meanwhile
            raise UserError("output_path", f"{str(folder)!r} holds {foreign[0]}, but no capture; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_sealed(path, plan, write_first)
    settled = _read(path)
    _refuse_differences(folder, plan, settled)
    return settled


def _refuse_differences(folder: Path, now: Plan, then: Plan) -> None:
    for key, problem in _differences(now, then):
        remedy = "restore it, or choose another output_path"
        raise UserError(key, f"{problem} when the capture in {str(folder)!r} began; {remedy}")


def _read(path: Path) -> Plan:
    try:
        return read_sealed(path, Plan, FORMAT)
    except UserError as error:  # another format
        remedy = "continue with the version that began the capture, or choose another folder"
        raise UserError("output_path", f"{path} {error.problem}; {remedy}") from error
    except (OSError, ValueError) as error:
        remedy = "restore it, or choose another folder"
        raise UserError("output_path", f"{path} is not the plan of a capture ({error}); {remedy}") from error


def _differences(now: Plan, then: Plan) -> Iterator[tuple[str, str]]:
    """Key and difference of each part of a plan that must not change and has changed."""
    present, past = _binding(now), without_secrets(_binding(then))
    before, after = (keys.pop("teacher.weights_sha256") for keys in (past, present))
    for key in [*present, *(key for key in past if key not in present)]:
        secret = HIDDEN in f"{present.get(key)}{past.get(key)}"  # which may be another, and is not kept
        if present.get(key) != past.get(key) and not secret:
            yield key, f"is {shown(present.get(key))}, but was {shown(past.get(key))}"
    if before != after:
        yield "teacher.path", "its weights are not what they were"
    if now.tokenizer_sha256 != then.tokenizer_sha256:
        yield "teacher.path", "its tokenizer is not what it was"
    if now.rows_sha256 != then.rows_sha256 or now.shards != then.shards:
        yield "dataset.train_dataset", "its rows are not what they were"
    if now.vocabulary_size != then.vocabulary_size:
        yield "teacher.path", f"its head has {now.vocabulary_size} columns, but had {then.vocabulary_size}"


def _binding(plan: Plan) -> dict[str, Any]:
    """The values of the configuration that decide what a shard holds, by key."""
    sections = {"": plan.capture, "teacher": plan.teacher, "compression": {plan.codec["kind"]: plan.codec["config"]}}
    values = {key: value for section, inner in sections.items() for key, value in _flat(inner, section)}
    return {key: value for key, value in values.items() if key not in NOT_BINDING}


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys, such as `teacher.kwargs.dtype`, and their values."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def _scan(rows: Dataset) -> tuple[str, bool, list[int]]:
    """SHA-256 of tokens, labels and boundaries; whether labels do not follow from tokens; tokens of each row."""
    digest = hashlib.sha256()
    labels_needed = False
    row_lengths: list[int] = []
    for table in rows.with_format("arrow").iter(batch_size=1000):
        columns = {name: _flat_list(table[name]) for name in ("input_ids", "labels", "seq_lengths")}
        for lengths, values in columns.values():
            digest.update(lengths.tobytes())
            digest.update(values.tobytes())
        (_, input_ids), (_, labels), (_, documents) = columns.values()
        row_lengths += columns["input_ids"][0].tolist()
        expected = input_ids.copy()
        expected[np.cumsum(documents) - documents] = IGNORED_LABEL
        labels_needed = labels_needed or not np.array_equal(labels, expected)
    return digest.hexdigest(), labels_needed, row_lengths


def _flat_list(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of the lists, and the values of all lists."""
    lengths = pc.list_value_length(column).to_numpy()
    return lengths.astype(np.int32), pc.list_flatten(column).to_numpy().astype(np.int32)
