"""What is refused before a run starts: things that are not built, files that are not there."""

from pathlib import Path
from typing import Any

import pytest

from distillkit.config import RunConfig, UserError, check_ready, resolve

ONLINE: dict[str, Any] = {
    "model": "org/student",
    "output_path": "out",
    "sequence_length": 512,
    "dataset": {"train_dataset": {"repo_id": "org/text"}},
    "teacher": {"kind": "hf", "path": "org/teacher"},
}


def check(**changes: Any) -> None:
    check_ready(resolve(RunConfig.parse({**ONLINE, **changes})))


def test_a_run_that_can_start() -> None:
    check()


def test_files_that_are_not_there(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(UserError, match=r"^dataset\.train_dataset\.disk_path: no such file or folder"):
        check(dataset={"train_dataset": {"disk_path": missing}})
    with pytest.raises(UserError, match=r"^evaluation\.dataset\.disk_path: no such file or folder"):
        check(evaluation={"dataset": {"disk_path": missing + "/*.txt"}})
    with pytest.raises(UserError, match=r"^model: no such file or folder"):
        check(model=missing)
    with pytest.raises(UserError, match=r"^teacher\.background: no such file or folder"):
        check(teacher={"kind": "dataset", "background": missing})
    with pytest.raises(UserError, match=r"^teacher\.path: no such file or folder"):
        check(teacher={"kind": "hf", "path": "./missing"})


def test_files_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for path in [tmp_path, tmp_path / "a.txt", tmp_path / "*.txt"]:
        check(dataset={"train_dataset": {"disk_path": str(path)}}, output_path=str(tmp_path / "new"))
    with pytest.raises(UserError, match=r"^output_path: .* is a file; name a folder"):
        check(output_path=str(tmp_path / "a.txt"))


@pytest.mark.parametrize(("name", "shown"), [("fsdp", "FSDP"), ("deepspeed", "DeepSpeed")])
def test_models_split_over_gpus_are_refused(name: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=rf"^training_args\.{name}: .*{shown}.* not supported yet, .*; remove it$"):
        check(training_args={name: "full_shard"})
    check(training_args={name: ""})
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(UserError, match=f"^accelerate: {shown} is not supported yet, .*launch with torchrun"):
        check()
