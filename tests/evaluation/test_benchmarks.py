"""The scores are those of lm-eval's own command; a student's do not depend on how many samples are read at once."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lm_eval._cli import HarnessCLI
from lm_eval.models.huggingface import HFLM

from distillkit.config.errors import UserError
from distillkit.config.evaluate import BenchmarksConfig, EvaluateConfig
from distillkit.evaluation.benchmarks import check_tasks, run_benchmark
from distillkit.evaluation.local_benchmarks import LOCAL_TASKS
from distillkit.evaluation.units import units_of
from distillkit.models.loading import load_model, load_tokenizer

from ..student.students import LAYOUTS, student
from ..training.tiny import BYTES, llama, save_llama
from ..training.tiny import tokenizer as byte_tokenizer
from .benchmark_files import ITEMS, write_files

TASKS = Path(__file__).parent / "tasks"
SAMPLES, BATCH = 5, 3
"""Of the 40 of each task: more than a batch; the last batch is not full, nor is that of four endings of each sample."""


@pytest.fixture(autouse=True)
def without_network(monkeypatch):
    """Whatever asks for the network fails at once, for lm-eval's command, too."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def settings(**changes):
    return BenchmarksConfig.parse({"tasks": ["distillkit_school"], "include_path": [str(TASKS)], **changes})


def by_command(model, tmp_path, monkeypatch, *options, tasks=("distillkit_school",), batch_size=BATCH):
    """What `lm_eval run` writes, by task; its command runs in this process."""
    words = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model}"]
    words += ["--tasks", ",".join(tasks), "--include_path", str(TASKS), "--output_path", str(tmp_path / "out")]
    words += ["--seed", "1234", "--batch_size", str(batch_size), "--device", "cpu", *options]
    monkeypatch.setattr(sys, "argv", words)
    command = HarnessCLI()
    command.execute(command.parse_args())
    (written,) = (tmp_path / "out").rglob("results_*.json")
    return json.loads(written.read_text())["results"]


def differs_by_sample(scores):
    """Whether the model has written more than nothing, and not the same each time."""
    score = scores["metrics"]["fingerprint"]
    return 0 < score["value"] < 1 and score["standard_error"] > 0.01


@pytest.mark.usefixtures("packages_unasked")
def test_scores_are_those_of_the_command(tmp_path, monkeypatch):
    folder = save_llama(tmp_path / "model", seed=0, max_position_embeddings=512)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    ours = run_benchmark(
        model, tokenizer, settings(num_fewshot=2, batch_size=BATCH), "distillkit_school", limit=SAMPLES
    )
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


@pytest.mark.usefixtures("packages_unasked")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_changes_no_score_of_a_student(layout):
    """Right padding for log-likelihoods, left padding for what is generated."""
    model = student(layout=layout, config_changes={"vocab_size": BYTES, "max_position_embeddings": 512})
    scores = [
        run_benchmark(model, byte_tokenizer(), settings(batch_size=size), "distillkit_school", limit=SAMPLES)
        for size in (1, BATCH)
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


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of benchmarks, and the same as on the hub."""
    import lm_eval.tasks.mmlu

    folder = tmp_path_factory.mktemp("benchmarks")
    (own,) = lm_eval.tasks.mmlu.__path__
    subjects = [path.stem.removeprefix("mmlu_") for path in Path(own).glob("default/mmlu_*.yaml")]
    return folder, write_files(folder, sorted(subjects))


@pytest.fixture
def answered(monkeypatch):
    """Every request that lm-eval makes of a model, and its answer."""
    answers = []
    for kind in ("loglikelihood", "generate_until"):
        answer = getattr(HFLM, kind)

        def kept(self, requests, *args, answer=answer, **kwargs):
            found = answer(self, requests, *args, **kwargs)
            answers.extend(zip([repr(request.args) for request in requests], found, strict=True))
            return found

        monkeypatch.setattr(HFLM, kind, kept)
    return answers


@pytest.mark.usefixtures("packages_unasked")
@pytest.mark.parametrize(
    ("shots", "tasks"), [(None, ["gsm8k", "arc_easy"]), (1, [task for task in LOCAL_TASKS if task != "gsm8k"])]
)
def test_tasks_of_local_files_score_as_those_of_the_hub(files, answered, tmp_path, monkeypatch, shots, tasks):
    """lm-eval's command reads the hub's datasets, of the same questions; equal requests have equal answers."""
    folder, hub = files
    monkeypatch.setattr("lm_eval.api.metrics.bootstrap_stderr", lambda *_, **__: 0.0)
    monkeypatch.setattr(HFLM, "max_gen_toks", 8)
    saved = save_llama(tmp_path / "model", seed=0, layers=1, max_position_embeddings=256)
    with monkeypatch.context() as online:
        online.setattr("datasets.load_dataset", lambda path, name=None, **_: hub[path, name])
        options = () if shots is None else ("--num_fewshot", str(shots))
        theirs = by_command(saved, tmp_path, monkeypatch, *options, tasks=tasks, batch_size=1)
    expected = sorted(answered)
    answered.clear()
    model, tokenizer = load_model(saved), load_tokenizer(saved)
    config = settings(data=str(folder), num_fewshot=shots, batch_size=1)
    ours = {}
    for task in tasks:
        ours |= run_benchmark(model, tokenizer, config, task)
    assert len({answer for _, answer in answered}) > 2
    for (request, answer), (same, theirs_of_it) in zip(sorted(answered), expected, strict=True):
        close = answer if isinstance(answer, str) else (pytest.approx(answer[0], rel=1e-5), answer[1])
        assert (request, theirs_of_it) == (same, close)
    assert set(ours) == set(theirs) and len(ours) == (2 if shots is None else 1 + 4 + 57 + 7)
    for task, scores in ours.items():
        for metric, score in scores["metrics"].items():
            name, _, filtered = metric.partition(",")
            assert score["value"] == pytest.approx(theirs[task][f"{name},{filtered or 'none'}"], rel=1e-5)
            items = [float(each) for each in scores["items"]["values"][metric]]
            assert len(items) == scores["samples"]
            if name != "perplexity":
                assert sum(items) / len(items) == pytest.approx(score["value"])
    digests = [scores["items"]["digest"] for scores in ours.values()]
    assert len(set(digests)) == len(digests)
    assert ours["arc_easy"]["note"].startswith("4 questions; the hub has 2,376")
    shown = "examples are taken from 5 questions; the hub has "
    if shots is None:
        assert f"{shown}7,473" in ours["gsm8k"]["note"] and shown not in ours["arc_easy"]["note"]
    else:
        assert f"{shown}16,113" in ours["piqa"]["note"]
        assert ours["mmlu"]["samples"] == 57 and ours["mmlu"]["higher_is_better"] == {"acc": True}
        assert 0 < ours["mmlu"]["metrics"]["acc"]["value"] < 1
        assert all(ours[task]["note"].startswith("MMLU-Redux") for task in ("mmlu", "mmlu_stem", "mmlu_anatomy"))


def test_a_whole_file_needs_no_note_and_progress_is_told(files, tmp_path, monkeypatch):
    folder, _ = files
    monkeypatch.setitem(LOCAL_TASKS, "piqa", replace(LOCAL_TASKS["piqa"], hub_rows=ITEMS))
    told = []
    model = llama(0, vocab=BYTES, max_position_embeddings=512)
    config = settings(data=str(folder))
    scores = run_benchmark(
        model, byte_tokenizer(), config, "piqa", progress=lambda done, total: told.append((done, total))
    )
    assert "note" not in scores["piqa"]
    assert told == [(done, 2 * ITEMS) for done in range(1, 2 * ITEMS + 1)]


def test_what_is_wrong_with_files_is_told(files, tmp_path):
    folder, _ = files
    copy = shutil.copytree(folder, tmp_path / "files")

    def line(task, **changes):
        with pytest.raises(UserError) as caught:
            check_tasks(settings(data=str(copy), **changes), [task])
        return str(caught.value).replace(str(copy), "FILES")

    def write(name, *rows):
        (copy / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert line("boolq").startswith("benchmarks.tasks: benchmarks.data has no 'boolq', only mmlu, arc_challenge, ")
    assert line("mmlu_stem").startswith("benchmarks.tasks: benchmarks.data has no 'mmlu_stem', only ")
    assert line("helaswag").startswith("benchmarks.tasks: lm-eval has no task 'helaswag'; did you mean 'hellaswag'")
    assert line("piqa", num_fewshot=5) == "benchmarks.data: has 5 examples for piqa; 5 of them need 6"
    (copy / "gsm8k_train.jsonl").unlink()
    assert line("gsm8k") == (
        "benchmarks.data: gsm8k needs the file gsm8k_train.jsonl (or .jsonl.gz) in 'FILES'; it holds the examples "
        "before a question (here 5)"
    )
    check_tasks(settings(data=str(copy), num_fewshot=0), ["gsm8k"])
    (copy / "arc_easy_test.jsonl").unlink()
    assert line("arc_easy") == "benchmarks.data: arc_easy needs the file arc_easy_test.jsonl (or .jsonl.gz) in 'FILES'"
    row = {"query": "Question: a\n", "choices": ["a", "b"], "gold": 1}
    write("piqa", row, {**row, "gold": 2})
    assert line("piqa").startswith("benchmarks.data: 'FILES/piqa.jsonl', line 2: gold: Input should be less than")
    write("piqa", {"goal": "a"})
    assert line("piqa") == "benchmarks.data: 'FILES/piqa.jsonl', line 1: query: Field required"
    write("piqa")
    assert line("piqa") == "benchmarks.data: 'FILES/piqa.jsonl' has no line"
    (copy / "hellaswag_validation.jsonl.gz").write_bytes(b"text")
    assert line("hellaswag").startswith("benchmarks.data: 'FILES/hellaswag_validation.jsonl.gz', line 1: Not a gzipped")
    question = {"question": "?", "choices": ["a"] * 4, "answer": 0}
    write("mmlu_redux_test", {**question, "subject": "anatomy"})
    assert line("mmlu") == "benchmarks.data: mmlu: 'abstract_algebra' is a subject without a question"
    arc = {"question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"}
    write("arc_challenge_test", arc)
    assert "line 1: Value error, answerKey must be one of choices.label" in line("arc_challenge")


def test_a_changed_file_is_another_unit(files, tmp_path):
    folder, _ = files
    copy = shutil.copytree(folder, tmp_path / "files")

    def unit_settings():
        benchmarks = {"tasks": ["piqa", "openbookqa"], "data": str(copy)}
        data = {"output_path": "out", "students": {"a": {"path": "a"}}, "benchmarks": benchmarks}
        units = units_of(EvaluateConfig.parse(data), torch.device("cpu"))
        return {unit.task: unit.settings for unit in units if unit.suite == "benchmarks"}

    before = unit_settings()
    assert unit_settings() == before
    with (copy / "piqa_train.jsonl").open("a") as file:
        file.write("\n")
    after = unit_settings()
    assert after["piqa"] != before["piqa"] and after["openbookqa"] == before["openbookqa"]


def test_mistakes_are_told(tmp_path, monkeypatch):
    model, tokenizer = llama(0), byte_tokenizer()
    with pytest.raises(UserError, match=r"benchmarks\.tasks: lm-eval has no task 'helaswag'; did you mean 'hellaswag'"):
        run_benchmark(model, tokenizer, settings(), "helaswag")
    with pytest.raises(UserError, match=r"benchmarks\.include_path\[1\]: no such folder"):
        run_benchmark(model, tokenizer, settings(include_path=[str(TASKS), str(tmp_path / "no")]), "distillkit_facts")
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(UserError, match=r"benchmarks: lm-eval cannot be imported .* pip install 'distillkit\[eval\]'"):
        run_benchmark(model, tokenizer, settings(), "distillkit_facts")
