"""What run.json keeps, others may read."""

import json
import sys
from pathlib import Path

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
