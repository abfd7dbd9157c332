"""Benchmarks are started by hand and rarely, so nothing else would notice that one has lost what it imports."""

import importlib
import json
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    """A module by its name: they import each other by theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module


def test_every_benchmark_starts(benchmark, monkeypatch):
    scripts = sorted(map(str, BENCHMARKS.glob("*.py")))
    assert scripts
    for script in scripts:
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        ended = None
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            ended = end.code
        assert not ended, script


def test_every_row_is_kept_as_it_comes_with_where_it_comes_from(benchmark, tmp_path, monkeypatch, capsys):
    frame = benchmark("frame")

    @dataclass(kw_only=True)
    class Sizes(frame.Options):
        sizes: list[int] = frame.option([1, 2])  # noqa: RUF009

    def measure(options):
        for size in options.sizes:
            yield {"size": size, "curve": [size]}
            kept = json.loads((tmp_path / "small.json").read_text())
            assert kept["rows"][-1] == {"size": size, "curve": [size]} and kept["most"] == size

    monkeypatch.setattr(sys, "argv", ["x", "--sizes", "3", "4", "--output", str(tmp_path / "small.json")])
    frame.run(Sizes, measure, "sizes", "numpy", more=lambda _, rows: {"most": max(row["size"] for row in rows)})
    kept = json.loads((tmp_path / "small.json").read_text())
    assert kept["benchmark"] == "sizes" and [row["size"] for row in kept["rows"]] == [3, 4]
    assert kept["command"] == "python benchmarks/test_benchmarks.py --sizes 3 4 --output small.json"  # no folders
    assert {"numpy", "torch"} <= set(kept["versions"]) and {"cpu", "threads"} <= set(kept["machine"])
    assert capsys.readouterr().out.splitlines() == ['{"size": 3}', '{"size": 4}']
    assert Sizes(output=Path("other.json")).result_file == frame.RESULTS / "other.json"
    with pytest.raises(SystemExit) as end:
        frame.parse(Sizes, ["--size", "x"])
    assert end.value.code == 2 and "invalid int value: 'x'" in capsys.readouterr().err


def test_a_run_that_went_on_tells_the_phases_of_both_and_what_was_measured_last(benchmark):
    continued = benchmark("outcomes").continued
    short, long = ({"name": name, "tokens": tokens, "seconds": 2.0} for name, tokens in (("short", 10), ("long", 5)))
    common = {"commit": "a", "machine": {"gpu": "b"}}
    former = {
        "phases": [short], "tokens": 10, "seconds": 2.0, "overrides": ["x=1", "y=2"], "student": {"layout": "kda_only"},
        "command": "first", "needles": {"short": 1}, "error": "of the long rows", **common,
    }  # fmt: skip
    part = {
        "phases": [long], "tokens": 5, "seconds": 2.0, "overrides": ["x=1", "z=3"], "student": None,
        "command": "second", "needles": {"short": 2, "long": 3}, **common,
    }  # fmt: skip
    found = continued(former, part)
    assert found["phases"] == [short, long] and found["tokens"] == 15 and found["seconds"] == 4.0
    assert found["overrides"] == ["x=1", "y=2", "z=3"] and found["student"] == {"layout": "kda_only"}
    assert found["needles"] == {"short": 2, "long": 3} and "error" not in found
    assert found["before"] == {"command": "first", **common} and found["command"] == "second"
    again = continued(found, part)  # the same long rows once more
    assert again["phases"] == [short, long] and again["tokens"] == 15
    assert again["before"] == found["before"]
    whole = {**former, "phases": [short, long]}  # a run that had long rows of its own
    assert continued(whole, part)["before"]["command"] == "first"
    assert benchmark("cells").all_of("command", {"variants": {"a": found}}) == ["first", "second"]


def test_a_student_that_is_given_only_trains_in_long_rows_and_is_measured_before_and_after(benchmark, tmp_path, capsys):
    replication, parse = benchmark("replication"), benchmark("frame").parse

    def options(*words):
        return parse(replication.ReplicationOptions, [*paths, *words])

    paths = ["--teacher", "t", "--data", "d", "--eval", "e", "--work", str(tmp_path)]
    whole = options("--variants", "best_kda_only", "--long-tokens", "5M")
    paths += ["--go-on", str(tmp_path)]
    given = options("--variants", "best_kda_only-more", "--long-tokens", "5M")
    plan = replication.plan("best_kda_only-more", given)
    run = plan["files"]["run.yaml"]
    assert run["phases"] == benchmark("variants").run_of("best_kda_only", tmp_path, whole)["phases"][-1:]
    assert [phase["name"] for phase in run["phases"]] == ["long"]
    assert run["student"] is None and run["model"] == str(tmp_path)
    students = plan["files"]["divergence-2048.yaml"]["students"]
    assert {name: each["path"] for name, each in students.items()} == {
        "short": str(tmp_path),
        "long": str(tmp_path / "best_kda_only-more" / "run" / "phases" / "1-long"),
    }
    one = "--go-on is for one variant and its long rows"
    for mistake, message in (
        (["--variants", "best", "best_kda_only"], one),
        (["--variants", "teacher"], one),
        (["--variants", "best", "--long-tokens", "0"], one),
        (["--variants", "best", "--go-on", str(tmp_path / "none")], "--go-on: no folder"),
        (["--variants", "best", "bset"], "--variants: 'bset': must be one of hybrid"),
        (["--set", "best"], "--set: 'best': must be VARIANT.key=value"),
    ):
        with pytest.raises(SystemExit):
            options(*mistake)
        assert message in capsys.readouterr().err


def test_trials_stand_in_the_order_of_their_tokens(benchmark):
    names = ["best_kda_only-185M-asked", "best-85M", "hybrid", "best_kda_only-85M", "best_kda_only"]
    expected = ["hybrid", "best-85M", "best_kda_only", "best_kda_only-85M", "best_kda_only-185M-asked"]
    assert sorted(names, key=benchmark("replication").place) == expected
