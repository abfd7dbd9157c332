"""The share of its teacher's scores that a student keeps, by hand."""

import math
import random
import statistics
from pathlib import Path

import pytest

from distillkit.reporting.comparison import comparison
from distillkit.reporting.evaluated import merge_models
from distillkit.reporting.reading import Evaluation, Results
from distillkit.reporting.report import build_report
from distillkit.reporting.shares import comparable_tasks, paired, paired_over, share_of_teacher

from .examples import evaluation


def scores(**tasks):
    """value, standard error and chance by task"""
    return {
        name: {"metrics": {"acc": {"value": value, "standard_error": error}}, "chance": chance, "samples": 100}
        for name, (value, error, chance) in tasks.items()
    }


TEACHER = scores(arc=(0.65, 0.02, 0.25), gsm8k=(0.4, 0.01, 0.0), hard=(0.26, 0.02, 0.25))
STUDENT = scores(arc=(0.45, 0.02, 0.25), gsm8k=(0.3, 0.01, 0.0), hard=(0.24, 0.02, 0.25))


def models(student=STUDENT, teacher=TEACHER):
    content = evaluation(("hybrid",), benchmarks={"SmolLM2-135M": teacher, "hybrid": student})
    content["config"]["benchmarks"]["tasks"] = ["arc", "gsm8k", "hard"]
    return merge_models([Evaluation(Path("results.json"), content)])


def share(tasks, **changed):
    teacher, student = models(**changed)
    return share_of_teacher(student, teacher, tasks)


def test_the_share_is_of_what_is_above_chance():
    assert share(["arc"]).value == pytest.approx(0.2 / 0.4)
    assert share(["gsm8k"]).value == pytest.approx(0.75)
    assert share(["hard"]).value is None  # the teacher itself may be guessing
    assert share(["arc", "gsm8k", "hard"]).value == pytest.approx((0.2 + 0.3 - 0.01) / (0.4 + 0.4 + 0.01))
    assert comparable_tasks(models()) == ["arc", "gsm8k", "hard"]


def test_its_error_is_that_of_a_ratio():
    """As drawn from both errors a hundred thousand times."""
    rng, drawn = random.Random(0), []
    for _ in range(100_000):
        ours = [rng.gauss(each["metrics"]["acc"]["value"] - each["chance"], 0.02) for each in STUDENT.values()]
        theirs = [rng.gauss(each["metrics"]["acc"]["value"] - each["chance"], 0.02) for each in TEACHER.values()]
        drawn.append(sum(ours) / sum(theirs))
    teacher, student = ({**each, "gsm8k": dict(each["gsm8k"])} for each in (TEACHER, STUDENT))
    for each in (teacher, student):
        acc = each["gsm8k"]["metrics"]["acc"]
        each["gsm8k"]["metrics"] = {"acc": {**acc, "standard_error": 0.02}}
    found = share(["arc", "gsm8k", "hard"], teacher=teacher, student=student)
    assert found.error == pytest.approx(statistics.stdev(drawn), rel=0.02)
    assert math.isclose(found.value, statistics.mean(drawn), rel_tol=0.01)


def itemised(digest="d", **tasks):
    """Results with a record of each item, by task: digits of an accuracy, or other numbers."""
    found = {}
    for name, values in tasks.items():
        numbers = [float(each) for each in values]
        metric = {"value": statistics.mean(numbers), "standard_error": statistics.stdev(numbers) / len(numbers) ** 0.5}
        items = {"digest": digest, "values": {"acc": values}}
        about = {"chance": 0.25, "samples": len(numbers), "higher_is_better": {"acc": True}}
        found[name] = {"metrics": {"acc": metric}, **about, "items": items}
    return found


OURS, THEIRS = "0110100111" * 20, "0111000111" * 20


def test_students_are_compared_item_by_item():
    """With the error of McNemar's test, which is much less than that of two sets of items."""
    teacher, student = models(itemised(arc=OURS), itemised(arc=THEIRS))
    found = paired(student, teacher, "arc", "acc")
    assert (found.items, found.win, found.tie, found.loss, found.difference) == (200, 0.1, 0.8, 0.1, 0)
    wins = losses = 20
    mcnemar = math.sqrt(wins + losses - (wins - losses) ** 2 / 200) / 200
    assert found.error == pytest.approx(mcnemar, rel=0.01)
    assert found.not_worse == pytest.approx(0.9)
    assert found.not_worse_error == pytest.approx(math.sqrt(0.9 * 0.1 / 200), rel=0.01)


def test_over_tasks_each_counts_the_same():
    teacher, student = models(itemised(arc=OURS, gsm8k="1010"), itemised(arc=THEIRS, gsm8k="1111"))
    found = paired_over(student, teacher, ["arc", "gsm8k"])
    assert (found.items, found.win, found.loss) == pytest.approx((204, 0.05, 0.3))
    assert found.difference == pytest.approx((0 - 0.5) / 2)
    arc, gsm8k = (paired(student, teacher, task, "acc") for task in ("arc", "gsm8k"))
    assert found.error == pytest.approx(math.hypot(arc.error, gsm8k.error) / 2)
    assert paired_over(student, teacher, ["arc", "hard"]) is None


def test_likelihoods_and_metrics_that_should_be_low_are_compared_too():
    ours, theirs = itemised(arc=[-1.0, -2.5, -3.0]), itemised(arc=[-1.0, -2.0, -4.0])
    teacher, student = models(ours, theirs)
    found = paired(student, teacher, "arc", "acc")
    assert (found.win, found.tie, found.loss) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert found.difference == pytest.approx(0.5 / 3)
    assert found.error == pytest.approx(statistics.stdev([0, -0.5, 1.0]) / math.sqrt(3))
    ours["arc"]["higher_is_better"] = {"acc": False}
    teacher, student = models(
        {"arc": {**ours["arc"], "items": {"digest": "d", "values": {"acc": "0011"}}}}, itemised(arc="0000")
    )
    found = paired(student, teacher, "arc", "acc")
    assert (found.win, found.loss, found.difference) == (0, 0.5, 0.5)


@pytest.mark.parametrize(
    "student",
    [
        itemised("other items", arc=OURS),
        {"arc": {**itemised(arc=OURS)["arc"], "items": {"digest": "d", "values": {"acc": "01x"}}}},
        {"arc": {**itemised(arc=OURS)["arc"], "items": {"digest": "d", "values": {"acc": [1.0, None]}}}},
        {"arc": {name: each for name, each in itemised(arc=OURS)["arc"].items() if name != "items"}},
    ],
)
def test_other_items_and_damaged_records_are_not_paired(student):
    teacher, student = models(student, itemised(arc=THEIRS))
    assert paired(student, teacher, "arc", "acc") is None


def test_two_evaluations_are_paired_and_the_report_leads_with_it():
    """The teacher measured in one, the student in another; a difference by chance of two samples is none of pairs."""
    teacher, student = itemised(arc=THEIRS), itemised(arc="1" * 8 + THEIRS[8:])
    contents = []
    for benchmarks in ({"SmolLM2-135M": teacher}, {"hybrid": student}):
        content = evaluation(("hybrid",), benchmarks=benchmarks, divergence={}, needles={}, speed={})
        content["config"]["benchmarks"]["tasks"] = ["arc"]
        contents.append(Evaluation(Path("results.json"), content))
    report = build_report(Results(contents, []))
    (line,) = report.parts[0].lines
    assert "100.0% of answers at least as right as its teacher's (more 2.0%, less 0.0%)" in line.replace(" ± 0.0", "")
    rows = {row[0]: row for row in comparison(merge_models(contents)).rows}
    assert rows["win or tie, arc"][2].text.startswith("100.0%")
    better = 8 - THEIRS[:8].count("1")
    pair = statistics.stdev([1] * better + [0] * (200 - better)) / math.sqrt(200)
    assert rows["difference of the scores, arc"][2].text == f"{better / 2:.1f}% ± {100 * pair:.1f}"
    assert rows["arc (acc)"][2].tone == ("better" if better / 200 > 1.96 * pair else None)


def test_what_is_unknown_is_left_out():
    """An error; chance, as in results of earlier versions; a task that one model lacks."""
    without = {**STUDENT, "arc": scores(arc=(0.45, None, 0.25))["arc"]}
    assert share(["arc"], student=without).value == pytest.approx(0.5)
    assert share(["arc"], student=without).error is None
    old = {**STUDENT, "arc": {name: each for name, each in STUDENT["arc"].items() if name != "chance"}}
    assert comparable_tasks(models(student=old)) == ["gsm8k", "hard"]
    assert comparable_tasks(models(student={"gsm8k": STUDENT["gsm8k"]})) == ["gsm8k"]


def test_the_report_leads_with_it_beside_kl():
    content = evaluation(("hybrid",), benchmarks={"SmolLM2-135M": TEACHER, "hybrid": STUDENT})
    content["config"]["benchmarks"]["tasks"] = ["arc", "gsm8k", "hard"]
    lead = build_report(Results([Evaluation(Path("results.json"), content)], [])).parts[0].lines
    assert lead[0].startswith("hybrid: 60.5% ± 4.3 of its teacher's score above chance over 3 tasks; KL 0.6336 nats")


def test_the_table_begins_with_it():
    rows = comparison(models()).rows
    labels = [row[0] for row in rows]
    start = labels.index("share of the teacher's scores above chance")
    assert labels[start + 1 : start + 5] == ["over 3 tasks", "arc", "gsm8k", "hard"]
    assert labels.index("divergence from the teacher") > start
    assert [[cell.text for cell in row[1:]] for row in rows[start + 2 : start + 5]] == [
        ["100.0%", "50.0% ± 5.6"],
        ["100.0%", "75.0% ± 3.1"],
        ["100.0%", "–"],
    ]


def test_results_of_generation_are_shown():
    choices = {"letter_accuracy": 0.5, "cloze_accuracy": 0.6, "unparsed": 0.0, "standard_errors": {"unparsed": 0.0}}
    written = {"greedy": {"loops": 0.25}, "agreement": 0.4, "standard_errors": {"agreement": 0.03}}
    content = evaluation(("hybrid",))
    by_length = [{"tokens": 1, "agreement": 0.9, "identical": 0.9}, {"tokens": 2, "agreement": 0.8, "identical": 0.7}]
    content["generation"] = {
        "SmolLM2-135M": {"choices": choices},
        "hybrid": {
            "choices": {**choices, "letter_accuracy": 0.1, "unparsed": 0.9},
            "continuations": {**written, "by_length": by_length},
        },
    }
    evaluations = [Evaluation(Path("results.json"), content)]
    found = {
        row[0]: [cell.text + cell.note for cell in row[1:]]
        for row in comparison(merge_models(evaluations)).rows
        if len(row) == 3 and row[0] != "layers"
    }
    assert found["right by the likeliest letter"] == ["50.0%", "10.0%(−40.0 worse)"]
    assert found["right by the likeliest text (cloze)"] == ["60.0%", "60.0%(0.0)"]
    assert found["written answers that are no letter"] == ["0.0%", "90.0%(+90.0 worse)"]
    assert found["greedy tokens equal to the teacher's"] == ["–", "40.0% ± 3.0"]
    assert found["greedy: continuations that end in a loop"] == ["–", "25.0%"]
    sections = {part.title: part for part in build_report(Results(evaluations, [])).parts[1:]}
    assert sections["Generation"].parts[1].rows == [
        ["hybrid, equal tokens", "90.0%", "80.0%"],
        ["hybrid, all the same", "90.0%", "70.0%"],
    ]
