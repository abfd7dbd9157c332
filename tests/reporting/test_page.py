"""The report as a browser shows it: no errors, no requests, nothing wider than the window, in light and in dark."""

import pytest

from distillkit.reporting import write_report
from tests.reporting.chromium import CHROMIUM, Page
from tests.reporting.examples import evaluation, write_evaluation, write_phases

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    long_name = "a-student-with-a-long-name-and-no-place-to-break-it-" + "x" * 60
    content = evaluation(students=("hybrid", "kda-only", long_name))
    content["failures"] = [{"model": "hybrid", "suite": "benchmarks", "task": "gsm8k", "error": "E" * 400}]
    return write_report([write_evaluation(folder / "evaluation", content), write_phases(folder / "run")], folder)


@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_opens_without_errors_requests_or_overflow(report, width, dark):
    with Page(width, dark=dark) as page:
        page.open(report)
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert page.evaluate("innerWidth") == width
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        wide = (
            "[...document.querySelectorAll('main svg')].filter(each => each.getBoundingClientRect().right > innerWidth)"
        )
        assert page.evaluate(f"{wide}.length") == 0
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert light == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
        assert page.requests() == []
        assert page.console_messages() == []


def test_teacher_and_first_student_are_seen_on_a_telephone(report):
    ends = """(() => {
        const table = document.querySelector('table')
        const cells = [...table.querySelectorAll('tr')].flatMap(row => [...row.children].slice(1, 3))
        return Math.max(...cells.map(cell => cell.getBoundingClientRect().right))
    })()"""
    with Page(400) as page:
        page.open(report)
        assert page.evaluate(ends) <= 400


def test_labels_stay_inside_of_their_pictures(report):
    outside = """[...document.querySelectorAll('main svg')].flatMap(svg => [...svg.querySelectorAll('text')]
        .filter(text => {
        const frame = svg.getBoundingClientRect(), box = text.getBoundingClientRect()
        return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1
    }).map(text => text.textContent))"""
    with Page(1200) as page:
        page.open(report)
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert page.evaluate(outside) == []
