"""The examples of docs/python_api.md, and the README's student in Python, run as they are written."""

import re
from pathlib import Path

import pytest

from tests.training.tiny import save_llama, save_text

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language, in their order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [code for found, code in BLOCK.findall(text) if found == language]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all examples of the page have run, one after another."""
    folder = tmp_path_factory.mktemp("api")
    save_llama(folder / "teacher", 0, layers=4)
    save_text(folder / "train.jsonl")
    save_text(folder / "held_out.jsonl", documents=10)
    for code in blocks("docs/python_api.md", "yaml"):
        name, _ = re.match(r"# (\S+)(\n)", code).groups()
        (folder / name).write_text(code)
    names: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for code in blocks("docs/python_api.md", "python"):
            exec(compile(code, "docs/python_api.md", "exec"), names)
    return folder


def test_the_examples_of_the_page_leave_what_they_promise(ran: Path) -> None:
    for path in ("untrained/config.json", "runs/evaluation/results.json"):
        assert (ran / path).is_file()
    for run in ("first", "second", "third"):
        assert (ran / "runs" / run / "model.safetensors").is_file()


def test_the_page_names_each_function_of_the_package(ran: Path) -> None:
    import distillkit

    page = (ROOT / "docs/python_api.md").read_text(encoding="utf-8")
    for name in re.findall(r"`distillkit\.(\w+)\(", page):
        assert callable(getattr(distillkit, name))


def test_the_readme_writes_with_a_student(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("README.md", "python")
    exec(compile(code.replace("runs/quickstart/student", str(ran / "runs/first")), "README.md", "exec"), {})
    assert "The theory of" in capsys.readouterr().out
