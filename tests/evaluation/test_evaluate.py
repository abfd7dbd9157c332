"""An evaluation measures each model once, goes on where it was stopped, and survives what cannot be measured."""

import gc
import importlib
import io
import json
import os
import shutil
import signal
import time
import weakref
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file, save_file

from distillkit.cli import main
from distillkit.config import DatasetSource, UserError
from distillkit.config.evaluate import EvaluateConfig, ModelConfig
from distillkit.data import build_dataset
from distillkit.evaluation import evaluate, measure_divergence
from distillkit.evaluation.held_out import held_out_batches
from distillkit.evaluation.model_spec import ModelSpec, trained_length
from distillkit.evaluation.suites import measure
from distillkit.evaluation.units import units_of
from distillkit.models.loading import load_model
from distillkit.reporting import write_report
from distillkit.teacher.live import LiveTeacher
from tests.forks import processes
from tests.training.tiny import BYTES, llama, row, save_llama, save_text, tokenizer

EVALUATE = importlib.import_module("distillkit.evaluation.evaluate")  # the module; the function is named like it


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A teacher, a student near it, one that is not, and a text."""
    folder = tmp_path_factory.mktemp("models")
    save_llama(folder / "teacher", 0, max_position_embeddings=512)
    save_llama(folder / "far", 1)
    shutil.copytree(folder / "teacher", folder / "near")
    weights = load_file(folder / "near" / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    noisy = {name: each + 0.02 * torch.randn(each.shape, generator=noise) for name, each in weights.items()}
    save_file(noisy, folder / "near" / "model.safetensors", metadata={"format": "pt"})
    save_text(folder / "text.jsonl")
    return folder


def described(places, out, *students, **changes):
    config = {
        "output_path": str(out),
        "teacher": {"path": str(places / "teacher")},
        "students": {name: {"path": str(places / name)} for name in students},
        "divergence": {
            "dataset": {"disk_path": str(places / "text.jsonl")},
            "num_tokens": 300,
            "sequence_length": 32,
            "position_buckets": [0, 8],
        },
        "speed": {"contexts": [4, 8], "decode_tokens": 2, "repeats": 1},
    }
    return EvaluateConfig.parse({**config, **changes})


def run(config):
    """(results, what was said)"""
    said = io.StringIO()
    return evaluate(config, Console(file=said, width=150)), said.getvalue()


def unit_files(out):
    """Result files by path, and when they were written."""
    return {path: path.stat().st_mtime_ns for path in Path(out).glob("units/*/*.json")}


@pytest.fixture(scope="module")
def whole(places, tmp_path_factory):
    """One evaluation of three students: its folder, results and what was said. Not to be changed."""
    shutil.copytree(places / "teacher", places / "same")
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, *run(described(places, out, "same", "near", "far"))


def test_tokens_of_the_hub_are_in_no_result(places, tmp_path):
    """Nor in config.yaml, which finds the same results when it is run again with the token in the environment."""
    model = {"path": str(places / "near"), "kwargs": {"token": "hf_hidden"}}
    run(described(places, tmp_path / "out", students={"near": model}, divergence=None))
    telling = {
        path.name for path in (tmp_path / "out").rglob("*") if path.is_file() and "hf_hidden" in path.read_text()
    }
    assert telling == set()
    before = unit_files(tmp_path / "out")
    evaluate(tmp_path / "out" / "config.yaml", Console(file=io.StringIO()))
    assert before and unit_files(tmp_path / "out") == before


def test_what_needs_the_teacher_beside_the_student_comes_first(places, tmp_path):
    """So that the teacher is not sent to the CPU and back."""
    text = {"disk_path": str(places / "text.jsonl")}
    config = described(
        places,
        tmp_path,
        "near",
        "far",
        generation={"dataset": text, "questions": text},
        needles={"tasks": ["niah_single_1"], "lengths": [256]},
        long_context={"dataset": text, "passages": text, "distances": [0]},
    )
    beside = {name: [] for name in ("teacher", "near", "far")}
    for unit in units_of(config, torch.device("cpu")):
        if unit.suite != "model":
            beside[unit.model].append(unit.beside_teacher)
    assert sum(beside["near"]) == 3 and beside["near"] == sorted(beside["near"], reverse=True) == beside["far"]
    assert not any(beside["teacher"])


def test_it_measures_what_a_run_measures(places, whole):
    _, results, said = whole
    source = DatasetSource(disk_path=str(places / "text.jsonl"))
    rows = build_dataset(source, tokenizer(), 32, seed=42)
    teacher, far = (load_model(places / name) for name in ("teacher", "far"))
    expected = measure_divergence(LiveTeacher(teacher), far, held_out_batches(rows, 3), num_tokens=300).as_metrics()
    measured = results["divergence"]["far"]
    assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert f"{measured['kl']:.4f}" in said


def test_a_teacher_beside_itself_and_the_order_of_students(whole):
    same, near, far = (whole[1]["divergence"][name] for name in ("same", "near", "far"))
    assert (same["kl"], same["agreement"]) == (0, 1)
    assert same["kl"] < near["kl"] < far["kl"]
    assert same["agreement"] > near["agreement"] > far["agreement"]
    assert same["layers"][1]["cosine"] > near["layers"][1]["cosine"] > far["layers"][1]["cosine"]


def test_the_result_file(places, whole):
    out, results, _ = whole
    assert json.loads((out / "results.json").read_text()) == results
    assert (results["kind"], results["format"], results["failures"]) == ("distillkit-evaluation", 1, [])
    assert results["command"] == f"distillkit evaluate {out / 'config.yaml'}"
    assert results["config"]["divergence"]["num_tokens"] == 300
    assert {"versions", "commit", "machine", "started", "finished"} <= set(results)
    parameters = sum(each.numel() for each in llama(0, vocab=BYTES).parameters())
    assert results["models"]["teacher"] == {
        "role": "teacher",
        "path": str(places / "teacher"),
        "parameters": parameters,
        "model_type": "llama",
        "layers": None,
        "trained_length": 512,
    }
    assert [name for name, model in results["models"].items() if model["role"] == "student"] == ["same", "near", "far"]
    assert {name: [row["context"] for row in rows] for name, rows in results["speed"].items()} == {
        name: [4, 8] for name in results["models"]
    }


def test_a_second_time_nothing_is_measured_nor_loaded(places, whole, monkeypatch):
    out, results, _ = whole
    before = unit_files(out)
    monkeypatch.setattr(ModelSpec, "load", lambda *args: pytest.fail("a model is loaded"))
    again, said = run(described(places, out, "same", "near", "far"))
    assert unit_files(out) == before
    assert "11 results exist already" in said
    assert {**again, "started": 0, "finished": 0} == {**results, "started": 0, "finished": 0}


def test_a_mapping_and_a_path_are_configurations_too(places, whole, tmp_path):
    out, results, _ = whole
    keys = described(places, out, "same", "near", "far").model_dump(mode="json")
    path = tmp_path / "evaluation.yaml"
    path.write_text(json.dumps(keys))  # JSON is YAML
    for form in (keys, path, str(path)):
        again, _ = run(form)
        assert {**again, "started": 0, "finished": 0} == {**results, "started": 0, "finished": 0}


def test_from_python_a_runs_results_are_not_overwritten_either(places, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    keys = described(places, tmp_path, "near").model_dump(mode="json")
    with pytest.raises(UserError, match=r"output_path: .* contains a run, whose results.json would be overwritten"):
        run(keys)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_results_that_were_made_elsewhere_are_named(places, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(described(places, out, "near"))
    monkeypatch.setattr(EVALUATE, "commit", lambda: "0123abc")
    results, said = run(described(places, out, "near", "far"))
    assert results["commit"] == "0123abc"
    elsewhere = results["measured_elsewhere"]
    assert [(each["model"], each["suite"], each["task"]) for each in elsewhere] == [
        ("teacher", "speed", "4"),
        ("teacher", "speed", "8"),
        ("near", "divergence", ""),
        ("near", "speed", "4"),
        ("near", "speed", "8"),
    ]
    assert all(each["commit"] != "0123abc" and each["versions"] == results["versions"] for each in elsewhere)
    assert "5 results were made by another commit, version or machine" in said
    write_report([out], tmp_path / "report")
    assert "| near | divergence |" in (tmp_path / "report" / "report.md").read_text()


def test_another_library_or_number_of_threads_is_measured_anew(places, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(described(places, out, "near"))
    before = unit_files(out)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        run(described(places, out, "near"))
    finally:
        torch.set_num_threads(threads)
    after = unit_files(out)
    assert sorted(path.name.split("-")[0] for path in after.keys() - before.keys()) == ["speed"] * 4
    monkeypatch.setattr("distillkit.evaluation.units.version", lambda package: "another")
    run(described(places, out, "near"))
    again = [path.name.split("-")[0] for path in unit_files(out).keys() - after.keys()]
    assert sorted(again) == ["divergence"] + ["speed"] * 4


def test_an_interrupted_evaluation_says_what_is_missing(places, tmp_path, monkeypatch):
    def interrupted(unit, *others):
        if unit.suite == "speed" and unit.task == "8":
            raise KeyboardInterrupt
        return measure(unit, *others)

    out = tmp_path / "out"
    monkeypatch.setattr(EVALUATE, "measure", interrupted)
    with pytest.raises(SystemExit):
        run(described(places, out, "near"))
    results = json.loads((out / "results.json").read_text())
    assert results["finished"] is None and results["failures"] == []
    missing = [(each["model"], each["suite"], each["task"]) for each in results["missing"]]
    assert missing == [
        ("teacher", "speed", "8"),
        ("near", "divergence", ""),
        ("near", "speed", "4"),
        ("near", "speed", "8"),
    ]
    write_report([out], tmp_path / "report")
    assert "4 results are missing" in (tmp_path / "report" / "report.md").read_text()
    monkeypatch.setattr(EVALUATE, "measure", measure)
    results, _ = run(described(places, out, "near"))
    assert results["finished"] is not None and results["missing"] == []


def test_weights_that_change_before_they_are_loaded_are_not_measured(places, tmp_path, monkeypatch):
    """Their results would be kept as those of the weights that were there when the evaluation began."""
    shutil.copytree(places / "near", tmp_path / "student")
    load = ModelSpec.load

    def later(subject, device):
        if subject.name == "student":
            shutil.copy(places / "far" / "model.safetensors", tmp_path / "student")
        return load(subject, device)

    monkeypatch.setattr(ModelSpec, "load", later)
    students = {"student": {"path": str(tmp_path / "student")}}
    results, _ = run(described(places, tmp_path / "out", students=students))
    assert {each["error"].split(";")[0] for each in results["failures"]} == {
        "students.student.path: its files have changed since the evaluation began"
    }
    assert results["divergence"] == {}


def test_what_is_new_is_added(places, tmp_path):
    out = tmp_path / "out"
    run(described(places, out, "near"))
    before = unit_files(out)
    settings = {"contexts": [4, 6, 8], "decode_tokens": 2, "repeats": 1}
    results, _ = run(described(places, out, "near", "far", speed=settings))
    after = unit_files(out)
    assert before.items() <= after.items()
    # Of far: itself, its divergence and three contexts; of the others one context each.
    assert len(after) - len(before) == 5 + 2
    assert [row["context"] for row in results["speed"]["near"]] == [4, 6, 8]


def test_changed_weights_and_settings_are_measured_again(places, tmp_path):
    shutil.copytree(places / "near", tmp_path / "student")
    students = {"student": {"path": str(tmp_path / "student")}, "far": {"path": str(places / "far")}}
    out = tmp_path / "out"
    first, _ = run(described(places, out, students=students))
    before = unit_files(out)
    shutil.copy(places / "far" / "model.safetensors", tmp_path / "student")
    second, _ = run(described(places, out, students=students))
    added = set(unit_files(out)) - set(before)
    assert {path.parent.name for path in added} == {"student"} and len(added) == 4
    assert second["divergence"]["student"] == second["divergence"]["far"] != first["divergence"]["student"]

    divergence = first["config"]["divergence"]
    third, _ = run(described(places, out, students=students, divergence={**divergence, "num_tokens": 200}))
    assert third["divergence"]["far"]["tokens"] == 200
    text = places / "text.jsonl"
    os.utime(text, ns=(0, 0))  # as if it had been written again
    before = unit_files(out)
    run(described(places, out, students=students))
    assert sorted(path.name.split("-")[0] for path in set(unit_files(out)) - set(before)) == ["divergence"] * 2


def test_killed_it_goes_on(places, tmp_path):
    out = tmp_path / "out"
    config = described(places, out, "near", "far")
    file = tmp_path / "evaluation.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")))  # JSON is YAML
    process = processes.Process(target=main, args=(["evaluate", str(file)],))
    process.start()
    while not list(out.glob("units/near/divergence-*.json")):
        assert process.is_alive()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    kept = unit_files(out)
    assert kept and not (out / "results.json").exists()
    results, said = run(config)
    assert kept.items() <= unit_files(out).items()
    assert "results exist already" in said
    assert results["failures"] == []
    assert set(results["divergence"]) == {"near", "far"}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"benchmarks": {"tasks": ["helaswag"]}}, "benchmarks.tasks: lm-eval has no task 'helaswag'; did you mean"),
        (
            {"benchmarks": {"tasks": ["piqa"], "data": "{places}"}},
            "benchmarks.data: piqa needs the file piqa.jsonl (or .jsonl.gz) in '{places}'",
        ),
        ({"benchmarks": {"tasks": ["piqa"], "data": "./none"}}, "benchmarks.data: no such folder: './none'"),
        (
            {"needles": {"lengths": [64], "haystack": {"disk_path": "{places}/teacher/config.json"}}},
            "needles.haystack: has no column text",
        ),
        (
            {"divergence": {"dataset": {"disk_path": "{places}/text.jsonl", "split": "validation"}}},
            "divergence.dataset.split: '{places}/text.jsonl' has no split 'validation'; it has train",
        ),
        ({"students": {"near": {"path": "{places}/none"}}}, "students.near.path: no such file or folder"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_measured_or_written(places, tmp_path, changes, line):
    changes = json.loads(json.dumps(changes).replace("{places}", str(places)))
    with pytest.raises(UserError) as caught:
        run(described(places, tmp_path / "out", "near", **changes))
    assert str(caught.value).startswith(line.replace("{places}", str(places)))
    assert not (tmp_path / "out").exists()


def test_what_fails_does_not_take_others_with_it(places, tmp_path, capsys):
    shutil.copytree(places / "near", tmp_path / "broken")
    os.truncate(tmp_path / "broken" / "model.safetensors", 1000)
    out = tmp_path / "out"
    needles = {"tasks": ["niah_single_1"], "lengths": [8, 512], "depths": 1, "samples": 1}
    students = {"broken": {"path": str(tmp_path / "broken")}, "near": {"path": str(places / "near")}}
    config = described(places, out, students=students, needles=needles)
    file = tmp_path / "evaluation.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    assert main(["evaluate", str(file)]) == 1
    said = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    failed = [(each["model"], each["suite"], each["task"]) for each in results["failures"]]
    of_the_broken = [(each["suite"], each["task"]) for each in results["failures"] if each["model"] == "broken"]
    assert of_the_broken == [
        ("divergence", ""),
        ("needles", "niah_single_1@8"),
        ("needles", "niah_single_1@512"),
        ("speed", "4"),
        ("speed", "8"),
    ]
    assert [each for each in failed if each[0] != "broken"] == [
        (name, "needles", "niah_single_1@8") for name in ("teacher", "near")
    ]
    error = results["failures"][-1]["error"]
    assert error.startswith("needles.lengths: ") and "\n" not in error
    assert "failed: near needles niah_single_1@8: needles.lengths: " in said
    assert set(results["divergence"]) == {"near"}
    assert [row["length"] for row in results["needles"]["near"]["niah_single_1"]] == [512]
    assert results["models"]["broken"]["parameters"] is None
    log = (out / "failures.log").read_text()
    assert log.count("Traceback (most recent call last):") >= len(failed)

    shutil.copy(places / "near" / "model.safetensors", tmp_path / "broken")
    mended, _ = run(config)
    assert [each["task"] for each in mended["failures"]] == ["niah_single_1@8"] * 3


def test_students_that_cannot_be_compared_are_measured_by_themselves(places, tmp_path):
    """Their tokenizer numbers other tokens than the teacher's."""
    other = tokenizer()
    tokens = list(other.get_vocab())
    state = json.loads(other.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary[tokens[50]], vocabulary[tokens[51]] = vocabulary[tokens[51]], vocabulary[tokens[50]]
    shutil.copytree(places / "near", tmp_path / "stranger")
    (tmp_path / "stranger" / "tokenizer.json").write_text(json.dumps(state))
    students = {"stranger": {"path": str(tmp_path / "stranger")}}
    results, _ = run(described(places, tmp_path / "out", students=students))
    (failure,) = results["failures"]
    assert failure["error"].startswith("teacher.path: its tokenizer is not the student's")
    assert len(results["speed"]["stranger"]) == 2


def test_a_student_without_a_tokenizer_has_the_teachers(places, tmp_path):
    llama(1, vocab=BYTES).save_pretrained(tmp_path / "bare")
    students = {"bare": {"path": str(tmp_path / "bare")}, "far": {"path": str(places / "far")}}
    results, _ = run(described(places, tmp_path / "out", students=students, speed=None))
    assert results["divergence"]["bare"] == results["divergence"]["far"]


def test_text_is_read_with_the_students_tokenizer_and_held_to_what_both_know(places, tmp_path):
    """As in a run: here a token of the student's own, which the teacher's tokenizer would read as seven bytes."""
    llama(1, vocab=BYTES + 1).save_pretrained(tmp_path / "student")
    more = tokenizer()
    more.add_special_tokens({"additional_special_tokens": ["<think>"]})
    more.save_pretrained(tmp_path / "student")
    (tmp_path / "text.txt").write_text("One is known to both, <think>and one is not.")
    divergence = {"dataset": {"disk_path": str(tmp_path / "text.txt")}}
    students = {"student": {"path": str(tmp_path / "student")}}
    config = described(places, tmp_path / "out", students=students, divergence=divergence, speed=None)
    (failure,) = run(config)[0]["failures"]
    expected = (
        f"divergence.dataset: holds token {BYTES} ('<think>'), which the teacher and the student do not both know"
    )
    assert failure["error"].startswith(expected)


def test_packed_rows_stay_as_they_are(places, tmp_path):
    rows = [row([9, 4, 11], seed=1), row([24], seed=2)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "packed")
    divergence = {"dataset": {"disk_path": str(tmp_path / "packed")}, "sequence_length": 32}
    results, _ = run(described(places, tmp_path / "out", "near", divergence=divergence, speed=None))
    assert results["divergence"]["near"]["tokens"] == 8 + 3 + 10 + 23
    assert results["divergence"]["near"]["documents"] == 4


def test_smoke_tries_everything_apart_from_the_real_results(places, tmp_path):
    out = tmp_path / "out"
    needles = {"tasks": ["niah_single_1"], "lengths": [512, 10**6]}
    results, _ = run(described(places, out, "near", needles=needles, smoke=True))
    assert list(out.iterdir()) == [out / "smoke"]
    assert results["failures"] == []
    assert results["divergence"]["near"]["tokens"] <= 2 * 31
    assert [(row["length"], row["total"]) for row in results["needles"]["near"]["niah_single_1"]] == [(512, 2)]
    assert [row["context"] for row in results["speed"]["near"]] == [4]
    assert results["config"]["smoke"] and results["config"]["output_path"] == str(out)


def test_no_more_than_the_teacher_and_one_student_are_in_memory(places, tmp_path, monkeypatch):
    alive, at_load = {}, {}
    load = ModelSpec.load

    def watched(subject, device):
        gc.collect()
        at_load[subject.name] = sorted(name for name, model in alive.items() if model() is not None)
        loaded = load(subject, device)
        alive[subject.name] = weakref.ref(loaded.model)
        return loaded

    monkeypatch.setattr(ModelSpec, "load", watched)
    run(described(places, tmp_path / "out", "near", "far"))
    assert at_load == {"teacher": [], "near": ["teacher"], "far": ["teacher"]}
    alive.clear()
    at_load.clear()
    run(described(places, tmp_path / "alone", "near", "far", divergence=None))
    assert at_load == {"teacher": [], "near": [], "far": []}


@pytest.mark.parametrize(
    ("named", "given", "expected"),
    [
        ("run", None, 24),
        ("run/checkpoint-4", None, 24),
        ("phased", None, 96),
        ("run/untrained", None, 2048),
        ("run", 777, 777),
    ],
)
def test_the_trained_length_is_that_of_the_run(tmp_path, named, given, expected):
    for folder in ("run", "run/checkpoint-4", "run/untrained", "phased"):
        save_llama(tmp_path / folder, 0, max_position_embeddings=2048)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"config": {"sequence_length": 24}}))
    phases = [{"name": "a"}, {"name": "b", "sequence_length": 96}]
    (tmp_path / "phased" / "run.json").write_text(json.dumps({"config": {"sequence_length": 24, "phases": phases}}))
    student = {"path": str(tmp_path / named), "trained_length": given}
    speed = {"contexts": [2], "decode_tokens": 1, "repeats": 1}
    config = EvaluateConfig.parse({"output_path": str(tmp_path / "out"), "students": {"s": student}, "speed": speed})
    assert run(config)[0]["models"]["s"]["trained_length"] == expected


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"config": {"phases": [1]}}', '{"config": null}'])
def test_a_run_json_of_someone_else_does_not_take_the_results_with_it(tmp_path, record):
    (tmp_path / "run.json").write_text(record)
    assert trained_length(ModelConfig(path=str(tmp_path)), 2048) == 2048
