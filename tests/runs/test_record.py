"""What run.json keeps, others may read."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from distillkit.config import RunConfig
from distillkit.runs.folder import changed_keys
from distillkit.runs.record import kept_config, new_record
from distillkit.runs.writing import read_json


def test_secrets_are_not_kept_and_change_nothing(tmp_path: Path, monkeypatch) -> None:
    def described(secret: str) -> RunConfig:
        teacher = {"kind": "hf", "path": "org/teacher", "kwargs": {"token": secret}}
        return RunConfig.parse(
            {
                "model": "org/student",
                "model_kwargs": {"token": secret},
                "teacher": teacher,
                "output_path": str(tmp_path),
                "sequence_length": 64,
                "dataset": {"train_dataset": {"disk_path": "text"}},
                "phases": [{"name": "a"}, {"name": "b", "teacher": teacher}],
            }
        )

    config = described("hidden-1")
    words = ["distillkit", "a.yaml", "teacher.kwargs.token=hidden-1", "model_kwargs={token: hidden-1}", "tokens=1k"]
    monkeypatch.setattr(sys, "argv", words)
    new_record(config).write(tmp_path)
    record = read_json(tmp_path / "run.json")
    assert "hidden-1" not in json.dumps(record)
    assert record["command"].endswith("tokens=1k")
    assert config.phases[1].teacher["kwargs"]["token"] == "hidden-1"
    assert list(changed_keys(described("hidden-2"), kept_config(config))) == []


def test_another_number_of_processes_reads_the_same_rows_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def described(batch: int, accumulation: int, **teacher: Any) -> RunConfig:
        training = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        return RunConfig.parse(
            {
                "model": "org/student",
                "teacher": {"kind": "hf", "path": "org/teacher", **teacher},
                "output_path": "out",
                "sequence_length": 64,
                "dataset": {"train_dataset": {"disk_path": "text"}},
                "training_args": training,
            }
        )

    def changed(config: RunConfig, processes: int | None) -> list[str]:
        return [key for key, _, _ in changed_keys(config, kept_config(described(2, 1)), processes)]

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert changed(described(2, 2), 4) == changed(described(1, 4), 4) == changed(described(1, 1), 1) == []
    assert changed(described(2, 1), 4) == ["training_args.gradient_accumulation_steps"]
    assert changed(described(1, 2), 2) == [
        "training_args.per_device_train_batch_size",
        "training_args.gradient_accumulation_steps",
    ]
    assert changed(described(2, 2, devices=[2, 3]), 4) == []  # which the processes share equally
    assert changed(described(2, 1), None) == []  # of a run of before, which did not note how many there were
