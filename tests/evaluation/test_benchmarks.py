"""The scores are those of lm-eval's own command; a student's do not depend on how many samples are read at once."""

import json
import sys
from pathlib import Path

import pytest
from lm_eval._cli import HarnessCLI

from distillkit.config.errors import UserError
from distillkit.config.evaluate import BenchmarksConfig
from distillkit.evaluation.benchmarks import run_benchmark
from distillkit.models.loading import load_model, load_tokenizer

from ..student.students import LAYOUTS, student
from ..training.tiny import BYTES, llama, save_llama
from ..training.tiny import tokenizer as byte_tokenizer

TASKS = Path(__file__).parent / "tasks"
SAMPLES = 9
"""Of the 40 of each task: more than a batch of 8; the last batch is not full."""


@pytest.fixture(autouse=True)
def without_network(monkeypatch):
    """Whatever asks for the network fails at once, for lm-eval's command, too."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def settings(**changes):
    return BenchmarksConfig.parse({"tasks": ["distillkit_school"], "include_path": [str(TASKS)], **changes})


def by_command(model, tmp_path, monkeypatch, *options):
    """What `lm_eval run` writes, by task; its command runs in this process."""
    words = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model}"]
    words += ["--tasks", "distillkit_school", "--include_path", str(TASKS), "--output_path", str(tmp_path / "out")]
    words += ["--seed", "1234", "--batch_size", "8", "--device", "cpu", *options]
    monkeypatch.setattr(sys, "argv", words)
    command = HarnessCLI()
    command.execute(command.parse_args())
    (written,) = (tmp_path / "out").rglob("results_*.json")
    return json.loads(written.read_text())["results"]


def differs_by_sample(scores):
    """Whether the model has written more than nothing, and not the same each time."""
    score = scores["metrics"]["fingerprint"]
    return 0 < score["value"] < 1 and score["standard_error"] > 0.01


def test_scores_are_those_of_the_command(tmp_path, monkeypatch):
    folder = save_llama(tmp_path / "model", seed=0, max_position_embeddings=512)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    ours = run_benchmark(model, tokenizer, settings(num_fewshot=2), "distillkit_school", limit=SAMPLES)
    theirs = by_command(folder, tmp_path, monkeypatch, "--num_fewshot", "2", "--limit", str(SAMPLES))
    assert set(ours) == {"distillkit_facts", "distillkit_sums", "distillkit_fingerprints"}
    for task, scores in ours.items():
        assert scores["samples"] == SAMPLES and scores["version"] == 1.0
        for metric, score in scores["metrics"].items():
            name, _, filtered = metric.partition(",")
            assert score["value"] == theirs[task][f"{name},{filtered or 'none'}"]
            assert score["standard_error"] == pytest.approx(theirs[task][f"{name}_stderr,{filtered or 'none'}"])
            assert scores["higher_is_better"][metric] is True
    assert ours["distillkit_facts"]["metrics"]["acc"]["standard_error"] > 0
    chances = {"distillkit_facts": 0.25, "distillkit_sums": 0, "distillkit_fingerprints": 0}
    assert {task: scores["chance"] for task, scores in ours.items()} == chances
    assert differs_by_sample(ours["distillkit_fingerprints"])
    assert set(ours["distillkit_sums"]["metrics"]) == {"exact_match,first-number"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_changes_no_score_of_a_student(layout):
    """Right padding for log-likelihoods, left padding for what is generated."""
    model = student(layout=layout, config_changes={"vocab_size": BYTES, "max_position_embeddings": 512})
    scores = [
        run_benchmark(model, byte_tokenizer(), settings(batch_size=size), "distillkit_school", limit=SAMPLES)
        for size in (1, 8)
    ]
    assert scores[0] == scores[1]
    assert differs_by_sample(scores[0]["distillkit_fingerprints"])


def test_a_task_by_itself_and_part_of_it(tmp_path, monkeypatch, capfd):
    """And without a word of lm-eval's or git's, also where there is no repository."""
    monkeypatch.chdir(tmp_path)
    model = llama(0, vocab=BYTES, max_position_embeddings=512)
    scores = run_benchmark(model, byte_tokenizer(), settings(), "distillkit_facts", limit=6)
    assert list(scores) == ["distillkit_facts"] and scores["distillkit_facts"]["samples"] == 6
    assert capfd.readouterr() == ("", "")


def test_mistakes_are_told(tmp_path, monkeypatch):
    model, tokenizer = llama(0), byte_tokenizer()
    with pytest.raises(UserError, match=r"benchmarks\.tasks: lm-eval has no task 'helaswag'; did you mean 'hellaswag'"):
        run_benchmark(model, tokenizer, settings(), "helaswag")
    with pytest.raises(UserError, match=r"benchmarks\.include_path\[1\]: no such folder"):
        run_benchmark(model, tokenizer, settings(include_path=[str(TASKS), str(tmp_path / "no")]), "distillkit_facts")
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(UserError, match=r"benchmarks: lm-eval cannot be imported .* pip install 'distillkit\[eval\]'"):
        run_benchmark(model, tokenizer, settings(), "distillkit_facts")
