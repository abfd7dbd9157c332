"""The Python of README and docs, run as it is written."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from distillkit.teacher.live import LiveTeacher
from tests.pages import ROOT, blocks, text_of
from tests.training.tiny import VOCAB, batch, llama, row, save_chat_model, save_chats, save_llama, save_text

Capture = pytest.CaptureFixture[str]


def run_example(page: str, replaced: dict[str, str] | None = None) -> dict[str, Any]:
    """Run the only Python of a page; the names that it leaves."""
    (code,) = blocks(ROOT / page, "python")
    for old, new in (replaced or {}).items():
        code = code.replace(old, new)
    names: dict[str, Any] = {}
    exec(compile(code, page, "exec"), names)
    return names


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all examples of the page have run, one after another."""
    folder = tmp_path_factory.mktemp("api")
    save_llama(folder / "teacher", 0, layers=4)
    save_text(folder / "train.jsonl")
    save_text(folder / "held_out.jsonl", documents=10)
    for code in blocks(ROOT / "docs/python_api.md", "yaml"):
        name, _ = re.match(r"# (\S+)(\n)", code).groups()
        (folder / name).write_text(code)
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for code in blocks(ROOT / "docs/python_api.md", "python"):
            exec(compile(code, "docs/python_api.md", "exec"), names)
    return folder


def test_the_examples_of_the_page_leave_what_they_promise(ran: Path) -> None:
    for path in ("untrained/config.json", "runs/evaluation/results.json"):
        assert (ran / path).is_file()
    for run in ("first", "second", "third"):
        assert (ran / "runs" / run / "model.safetensors").is_file()


def test_the_page_names_functions_of_the_package() -> None:
    import distillkit

    for name in re.findall(r"`distillkit\.(\w+)\(", text_of(ROOT / "docs/python_api.md")):
        assert callable(getattr(distillkit, name))


def test_the_readme_writes_with_a_student(ran: Path, capsys: Capture) -> None:
    run_example("README.md", {"runs/quickstart/student": str(ran / "runs/first")})
    assert "The theory of" in capsys.readouterr().out


def test_the_page_on_chats_shows_what_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    save_chat_model(tmp_path / "student", 0)
    save_chats(tmp_path / "chats.jsonl", conversations=1)
    monkeypatch.chdir(tmp_path)
    run_example("docs/chat_distillation.md")
    shown = capsys.readouterr().out  # the whole row, then what counts of it
    assert shown.count("What is 0 and 0?") == 1
    assert shown.count("It is 0.") == 2


def test_the_teacher_of_the_page_on_contributing_is_the_mean_of_two() -> None:
    models = [llama(seed) for seed in (0, 1)]
    teacher = run_example("docs/contributing.md")["MeanTeacher"](*map(LiveTeacher, models))
    tokens = batch(row([6, 5]))
    every = torch.arange(11)
    signal = teacher.signal(tokens)
    mean = sum(LiveTeacher(model).signal(tokens).distribution(every)(slice(0, 4)).logits for model in models) / 2
    torch.testing.assert_close(signal.distribution(every)(slice(0, 4)).logits, mean)
    assert teacher.vocabulary_size == VOCAB
