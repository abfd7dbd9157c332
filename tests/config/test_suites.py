"""The YAML and the options of `distillkit evaluate`: what they come to, and the line that tells of a mistake."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from distillkit.config import UserError
from distillkit.config.evaluate import EvaluateConfig
from distillkit.config.evaluate_options import EvaluateOptions, check_evaluate_ready, load_evaluate_config

STUDENT = {"a": {"path": "someone/a"}}
LEAST = {"output_path": "out", "students": STUDENT, "speed": {}}


def line_of(data: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        EvaluateConfig.parse(data)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"output_path": None}, "output_path: is missing: folder for results.json"),
        ({"students": {}}, "students: is missing: name a student with its path, a teacher, or both"),
        ({"students": {"a": "someone/a"}}, "students.a: must be a mapping of keys to values, got 'someone/a'"),
        ({"students": {"a/b": {"path": "x"}}}, "students.a/b: must be a name of letters, digits, points, - and _;"),
        (
            {"students": {"teacher": {"path": "x"}}},
            "students.teacher: is the teacher's name in results; choose another",
        ),
        (
            {"students": {"a": {"path": "x", "kwargs": {"revision": date(2025, 1, 31)}}}},
            "students.a.kwargs.revision: 2025-01-31 is a date here; write text in quotes",
        ),
        ({"students": {"a": {"pth": "x"}}}, "students.a.pth: unknown key; did you mean 'path'?"),
        (
            {"speed": None},
            "divergence: is missing: give at least one of divergence, generation, benchmarks, needles, long_con",
        ),
        ({"sped": {}}, "sped: unknown key; did you mean 'speed'?"),
        ({"speed": {"contexts": [8, 4]}}, "speed.contexts: must ascend, each number once; got [8, 4]"),
        ({"speed": {"contexts": [0]}}, "speed.contexts[0]: must be > 0, got 0"),
        ({"speed": {"contexts": []}}, "speed.contexts: must have at least one entry"),
        ({"limit": 0}, "limit: must be > 0, got 0"),
        ({"benchmarks": {}}, "benchmarks.tasks: is missing: names of tasks"),
        ({"benchmarks": {"tasks": []}}, "benchmarks.tasks: must have at least one entry"),
        ({"needles": {"tasks": ["niah_single_1"]}}, "needles.lengths: is missing: tokens of a prompt"),
        (
            {"needles": {"lengths": [9], "tasks": ["niah"]}},
            "needles.tasks[0]: must be one of niah_single_1, niah_single_2,",
        ),
        ({"needles": {"lengths": [9], "batch_size": 0}}, "needles.batch_size: must be > 0, got 0"),
        ({"needles": {"lengths": [9]}}, "needles.haystack: is missing: niah_single_2 hides its needles in prose"),
        (
            {"long_context": {"dataset": {"disk_path": "x"}, "length": 9, "position_buckets": [9]}},
            "long_context.position_buckets: must begin before length, 9; got [9]",
        ),
        (
            {"long_context": {"dataset": {"disk_path": "x"}, "distances": [9, 0]}},
            "long_context.distances: must ascend, each number once; got [9, 0]",
        ),
        ({"divergence": {"dataset": {"disk_path": "x"}}}, "teacher: is missing: divergence compares students with a"),
        (
            {"teacher": {"path": "x"}, "divergence": {"dataset": {"disk_path": "x"}, "position_buckets": [0, 0]}},
            "divergence.position_buckets: must ascend, each number once; got [0, 0]",
        ),
    ],
)
def test_a_mistake_is_one_line(changes: dict[str, Any], line: str) -> None:
    assert line_of({**LEAST, **changes}).startswith(line)


def test_students_are_needed_to_be_compared() -> None:
    data = {"output_path": "out", "teacher": {"path": "x"}, "divergence": {"dataset": {"disk_path": "x"}}}
    assert line_of(data) == "students: is missing: divergence compares students with a teacher"


def test_a_text_that_nothing_reads_is_a_mistake() -> None:
    options = EvaluateOptions(students=["s"], suites=["speed"], data="text.parquet", out="o")
    with pytest.raises(UserError, match="--data: has no effect: no suite runs that reads a text"):
        load_evaluate_config(None, [], options)


def test_tasks_that_make_their_haystack_need_none() -> None:
    needles = {"lengths": [1024], "tasks": ["niah_single_1", "niah_multikey_2", "niah_multikey_3"]}
    assert EvaluateConfig.parse({**LEAST, "needles": needles}).needles is not None


def test_what_is_written_down_is_read_again() -> None:
    config = EvaluateConfig.parse({**LEAST, "needles": {"lengths": [9], "haystack": {"repo_id": "a/b"}}})
    assert EvaluateConfig.parse(json.loads(json.dumps(config.model_dump(mode="json")))) == config


def test_options_alone_say_as_much_as_a_file() -> None:
    options = EvaluateOptions(
        teacher="t.gguf",
        students=["hybrid=runs/a", "someone/long", "b=x=y"],
        suites=["divergence", "needles"],
        data="text.parquet",
        out="out",
        limit=3,
        switches={"smoke": True, "trust_remote_code": False},
    )
    config = load_evaluate_config(None, ["needles.lengths=[1024, 2048]", "divergence.num_tokens=99"], options)
    text = {"disk_path": "text.parquet"}
    assert config == EvaluateConfig.parse(
        {
            "output_path": "out",
            "teacher": {"path": "t.gguf"},
            "students": {"hybrid": {"path": "runs/a"}, "long": {"path": "someone/long"}, "b": {"path": "x=y"}},
            "divergence": {"dataset": text, "num_tokens": 99},
            "needles": {"haystack": text, "lengths": [1024, 2048]},
            "limit": 3,
            "smoke": True,
        }
    )


def test_without_a_suite_a_text_means_divergence() -> None:
    options = EvaluateOptions(teacher="t", gguf_file="f", students=["s"], data="d", out="o")
    config = load_evaluate_config(None, [], options)
    assert config.teacher is not None and config.teacher.kwargs == {"gguf_file": "f"}
    assert config.divergence is not None and config.speed is None


def test_options_go_before_the_file_and_overrides_before_options(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.yaml"
    file.write_text(
        "output_path: a\nstudents: {x: {path: x}}\nlimit: 9\n"
        "speed: {contexts: [1, 2]}\nbenchmarks: {tasks: [hellaswag]}\n"
    )
    config = load_evaluate_config(
        file, ["limit=1"], EvaluateOptions(suites=["speed"], out="b", limit=5, students=["y"])
    )
    assert (config.output_path, config.limit, list(config.students)) == ("b", 1, ["y"])
    assert config.speed is not None and config.speed.contexts == [1, 2]
    assert config.benchmarks is None


def test_two_students_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match=r"^--student: two are named 'b'; name them: --student b-2=c/b$"):
        load_evaluate_config(None, [], EvaluateOptions(students=["a/b", "c/b"], suites=["speed"], out="o"))


def test_a_file_may_extend_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("output_path: a\nstudents: {x: {path: x}}\nspeed: {repeats: 1}\n")
    (tmp_path / "more.yaml").write_text("extends: base.yaml\nstudents: {y: {path: y}}\nspeed: {batch_size: 2}\n")
    config = load_evaluate_config(tmp_path / "more.yaml")
    assert list(config.students) == ["x", "y"]
    assert config.speed is not None and (config.speed.repeats, config.speed.batch_size) == (1, 2)


def readiness_line(**changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        check_evaluate_ready(EvaluateConfig.parse({**LEAST, **changes}))
    return str(caught.value)


def test_what_does_not_exist_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    check_evaluate_ready(EvaluateConfig.parse(LEAST))
    assert readiness_line(teacher={"path": "./t"}) == "teacher.path: no such file or folder: './t'"
    assert readiness_line(students={"a": {"path": "/s"}}) == "students.a.path: no such file or folder: '/s'"
    text = {"dataset": {"disk_path": "none.txt"}}
    line = "divergence.dataset.disk_path: no such file or folder: 'none.txt'"
    assert readiness_line(teacher={"path": "t"}, divergence=text) == line
    needles = {"lengths": [9], "haystack": {"disk_path": "none.txt"}}
    assert readiness_line(needles=needles) == "needles.haystack.disk_path: no such file or folder: 'none.txt'"
    tasks = {"tasks": ["mine"], "include_path": [str(tmp_path), "./none"]}
    assert readiness_line(benchmarks=tasks) == "benchmarks.include_path[1]: no such folder: './none'"
    file = tmp_path / "file"
    file.touch()
    assert readiness_line(output_path=str(file)) == f"output_path: {str(file)!r} is a file; name a folder"


def test_a_runs_results_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run.json").touch()
    line = f"output_path: {str(tmp_path)!r} contains a run, whose results.json would be overwritten; name another "
    assert readiness_line(output_path=str(tmp_path)).startswith(line)


def test_of_an_unfinished_run_a_checkpoint_must_be_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").touch()
    students = {"a": {"path": str(tmp_path)}}
    begun = f"students.a.path: the run in {str(tmp_path)!r} is not finished; "
    assert readiness_line(students=students) == begun + "it has no checkpoint yet"
    for name in ("phases/1-a/checkpoint-9", "checkpoint-8"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "phases/1-a/checkpoint-9/complete").touch()
    whole = tmp_path / "phases" / "1-a" / "checkpoint-9"
    assert readiness_line(students=students) == begun + f"name a checkpoint of it, such as {whole}"
    (tmp_path / "model.safetensors").touch()
    check_evaluate_ready(EvaluateConfig.parse({**LEAST, "students": students}))
