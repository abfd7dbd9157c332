"""A whole run of two processes that nobody watches over, as srun and mpirun start them: each of them must end."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distillkit.cli import main
from distillkit.config import RunConfig
from distillkit.data import dataset
from distillkit.training import distill
from tests.forks import environments, exit_codes, started
from tests.training.captures import captured, configuration
from tests.training.tiny import BYTES, save_llama, save_text

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    teacher, text = save_llama(folder / "teacher", 0), save_text(folder / "train.jsonl")
    return {
        "teacher": teacher,
        "student": save_llama(folder / "student", 1),
        "text": text,
        "captured": captured(teacher, text, folder / "captured", {"plain": {"k": 5, "vocab_size": BYTES}}),
    }


def saved(config):
    path = Path(f"{config.output_path}.yaml")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return str(path)


def two_commands(config):
    """Exit code and standard error of each, as a user's two processes of `python -m distillkit`."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "distillkit", saved(config)],
            env={**os.environ, **environment, "PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in environments()
    ]
    try:
        said = [process.communicate(timeout=90)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, errors) for process, errors in zip(started, said, strict=True)]


def run_as(environment, function, path, said):
    os.environ |= environment
    with said.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.exit(function(path))


def two_forks(config, function, folder):
    """Exit code and standard error of each, of processes that call the function with the configuration's path."""
    path, said = saved(config), [folder / f"said by {rank}" for rank in ("0", "1")]
    given = [(environment, function, path, file) for environment, file in zip(environments(), said, strict=True)]
    codes = exit_codes(started(run_as, given), 60)
    return [(code, file.read_text()) for code, file in zip(codes, said, strict=True)]


def command(path):
    return main([path])


def noted(path):
    """A run, and beside it a file of what its tokeniser was called for by each process."""
    described = RunConfig.parse(yaml.safe_load(Path(path).read_text()))
    tokenize_rows = dataset.tokenize_rows

    def tokenize_and_note(*given, key, **options):
        with Path(described.output_path).with_name(f"tokenised by {os.environ['RANK']}").open("a") as file:
            file.write(f"{key}\n")
        return tokenize_rows(*given, key=key, **options)

    dataset.tokenize_rows = tokenize_and_note
    distill(described)


def of_text(inputs, folder, **changes):
    live = {"kind": "hf", "path": inputs["teacher"]}
    text = {"train_dataset": {"disk_path": inputs["text"]}, "eval_dataset": {"disk_path": inputs["text"]}}
    return configuration(inputs["student"], "", folder, teacher=live, dataset=text, **changes)


def assert_first_alone_speaks(ended, line):
    (code, first), (others_code, other) = ended
    assert (code, others_code) == (2, 2)
    assert first.splitlines()[-1].startswith(line)
    assert "error" not in other.lower()


def test_a_mistake_that_the_first_process_finds_ends_both_and_is_told_once(inputs, tmp_path):
    data = shutil.copytree(inputs["captured"], tmp_path / "data")
    shard = data / "shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-10])
    config = configuration(inputs["student"], str(data), tmp_path / "run")
    line = "error: dataset.train_dataset.disk_path: shard-00001.parquet: is truncated"
    assert_first_alone_speaks(two_commands(config), line)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/model.safetensors").touch()
    line = "error: output_path: "
    config = of_text(inputs, tmp_path / "taken")
    assert_first_alone_speaks(two_forks(config, command, tmp_path), line)


def test_text_is_tokenised_once(inputs, tmp_path):
    config = of_text(inputs, tmp_path / "run", evaluation={"num_tokens": 50})
    for code, errors in two_forks(config, noted, tmp_path):
        assert code == 0, errors
    assert sorted(path.name for path in tmp_path.glob("tokenised*")) == ["tokenised by 0"]
    assert (tmp_path / "tokenised by 0").read_text() == "dataset.train_dataset\ndataset.eval_dataset\n"
    assert not list((tmp_path / "run").glob("*prepared*"))
    assert json.loads((tmp_path / "run/results.json").read_text())["training"]["step"] == 1
