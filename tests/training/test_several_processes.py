"""A whole run of two processes that nobody watches over, as srun and mpirun start them: each of them must end."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distillkit.config import RunConfig
from distillkit.data import dataset
from distillkit.training import distill
from tests.training.captures import captured, configuration
from tests.training.tiny import BYTES, save_llama, save_text

pytestmark = pytest.mark.timeout(120)


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


def two_processes(config, *command):
    """Exit code and standard error of each."""
    path = Path(f"{config.output_path}.yaml")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, *command, str(path)],
            env={
                **os.environ,
                **common,
                "RANK": rank,
                "LOCAL_RANK": rank,
                "PYTHONPATH": str(Path(__file__).parents[2]),
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        said = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, errors) for process, errors in zip(processes, said, strict=True)]


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
    assert_first_alone_speaks(two_processes(config, "-m", "distillkit"), line)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/model.safetensors").touch()
    line = "error: output_path: "
    config = of_text(inputs, tmp_path / "taken")
    assert_first_alone_speaks(two_processes(config, "-m", "distillkit"), line)


def test_text_is_tokenised_once(inputs, tmp_path):
    config = of_text(inputs, tmp_path / "run", evaluation={"num_tokens": 50})
    for code, errors in two_processes(config, __file__):
        assert code == 0, errors
    assert sorted(path.name for path in tmp_path.glob("tokenised*")) == ["tokenised by 0"]
    assert (tmp_path / "tokenised by 0").read_text() == "dataset.train_dataset\ndataset.eval_dataset\n"
    assert not list((tmp_path / "run").glob("*prepared*"))
    assert json.loads((tmp_path / "run/results.json").read_text())["training"]["step"] == 1


if __name__ == "__main__":
    described = RunConfig.parse(yaml.safe_load(Path(sys.argv[1]).read_text()))
    tokenize_rows = dataset.tokenize_rows

    def noted(*given, key, **options):
        with Path(described.output_path).with_name(f"tokenised by {os.environ['RANK']}").open("a") as file:
            file.write(f"{key}\n")
        return tokenize_rows(*given, key=key, **options)

    dataset.tokenize_rows = noted
    distill(described)
