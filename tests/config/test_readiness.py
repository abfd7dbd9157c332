"""What is refused before a run starts: things that are not built, files that are not there."""

import re
from pathlib import Path
from typing import Any

import pytest

from distillkit.config import RunConfig, UserError, check_ready, resolve
from distillkit.config.readiness import check_processes

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
    instead = r"write parallel: \{shard: auto\}"
    with pytest.raises(UserError, match=rf"^training_args\.{name}: {shown}.* {instead} at the top level instead$"):
        check(training_args={name: "full_shard"})
    check(training_args={name: ""})
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(UserError, match=rf"^accelerate: its {shown} .*launch with torchrun, and {instead}"):
        check()


@pytest.mark.parametrize(
    ("parallel", "processes", "sizes"),
    [
        ({}, 1, (1, 1)),
        ({}, 8, (1, 8)),
        ({"replicate": 2}, 8, (2, 4)),
        ({"shard": 4, "replicate": 2}, 8, (2, 4)),
        ({"shard": 4}, 8, "shard 4 × replicate 1 needs 4 processes, and there are 8"),
        ({"replicate": 3}, 8, "shard auto × replicate 3 needs 6 processes, and there are 8"),
        ({"context": 4}, 8, (1, 8)),
        ({"context": 16}, 8, "16 does not divide the 8 processes"),
        ({"shard": 2}, 1, "needs 2 processes, and there are 1; start with torchrun --nproc-per-node 2"),
    ],
)
def test_as_many_processes_as_parallel_says(
    parallel: dict[str, Any], processes: int, sizes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    run = resolve(RunConfig.parse({**ONLINE, "parallel": parallel}))
    assert run.config.parallel is not None
    if isinstance(sizes, tuple):
        check_processes(run)
        assert run.config.parallel.sizes(processes) == sizes
    else:
        with pytest.raises(UserError, match=rf"^parallel(\.context)?: .*{sizes}"):
            check_processes(run)


def test_what_parallel_cannot_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"^training_args\.optim: adafactor cannot be divided \(parallel\); use one of"):
        RunConfig.parse({**ONLINE, "parallel": {}, "training_args": {"optim": "adafactor"}})
    for wrong in ({"shard": 0}, {"shard": "all"}, {"replicate": "2"}, {"context": 0}):
        with pytest.raises(UserError, match=r"^parallel\."):
            RunConfig.parse({**ONLINE, "parallel": wrong})


FLASH = {"kwargs": {"attn_implementation": "flash_attention_2"}}
SERVER = {"kind": "server", "url": "http://localhost:1/v1", "top_k": 8}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model_kwargs": FLASH["kwargs"]}, "model_kwargs.attn_implementation: must be sdpa"),
        ({"teacher": ONLINE["teacher"] | FLASH}, "teacher.kwargs.attn_implementation: must be sdpa"),
        ({"teacher": ONLINE["teacher"] | {"devices": [4, 5]}}, "teacher.devices: cannot be where rows are divided"),
        ({"teacher": ONLINE["teacher"] | {"kwargs": {"device_map": "auto"}}}, "teacher.kwargs.device_map: cannot be"),
        ({"teacher": SERVER}, "parallel.context: a server reads whole rows"),
    ],
)
def test_rows_that_cannot_be_divided_are_refused(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(error)}"):
        RunConfig.parse({**ONLINE, "parallel": {"context": 4}, **changes})
