"""The content of a report: the numbers of the files, differences with their direction, nothing unmeasured."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from distillkit.config import RunConfig, UserError
from distillkit.reporting import numbers, write_report
from distillkit.reporting.comparison import comparison
from distillkit.reporting.document import table
from distillkit.reporting.evaluated import merge_models, score
from distillkit.reporting.evaluation_sections import benchmark_section
from distillkit.reporting.reading import Evaluation, read_results
from distillkit.reporting.report import build_report
from tests.reporting.examples import (
    LENGTHS,
    TASKS,
    divergence,
    evaluation,
    metrics,
    model,
    needles,
    results,
    run_config,
    scored,
    speed,
    write_evaluation,
    write_phases,
    write_run,
)


def report_of(tmp_path, *contents):
    """The Markdown of a report of evaluations."""
    folders = [write_evaluation(tmp_path / f"evaluation{index}", content) for index, content in enumerate(contents)]
    write_report(folders, tmp_path)
    return (tmp_path / "report.md").read_text()


def table_of(*contents):
    """The table teacher | students alone, which needs no pictures."""
    return table(comparison(merge_models([Evaluation(Path("results.json"), content) for content in contents])))


@pytest.fixture(scope="module")
def standard(tmp_path_factory):
    """The folder of the report of the example as it is."""
    folder = tmp_path_factory.mktemp("standard")
    report_of(folder, evaluation())
    return folder


def row(markdown, label, after=""):
    """The cells of the row of a table that begins with `label`, the first one after the text `after`."""
    found = re.search(rf"^\| {re.escape(label)} \| (.*) \|$", markdown[markdown.index(after) :], re.MULTILINE)
    assert found, label
    return [cell.strip() for cell in found[1].split(" | ")]


class Reader(HTMLParser):
    """The text of a page, its unclosed elements, and what it would fetch."""

    VOID = ("meta", "link", "br", "img", "hr")

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.fetched, self.tags = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on")
            if name in ("src", "srcset", "action", "data") or (name.endswith("href") and tag != "a"):
                self.fetched.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_multiple_is_written_in_one_way():
    values = [(2.5, "×2.5"), (0.127, "×0.127"), (0.0127, "×0.0127"), (0.000254, "×0.000254"), (1234.4, "×1,234")]
    values += [(0.0000254, "×0.0000254"), (0, "×0"), (1, "×1")]
    assert [(value, numbers.ratio(value)) for value, _ in values] == values


def test_numbers_and_differences_are_those_of_the_file():
    content = evaluation()
    markdown = table_of(content)
    assert row(markdown, "KL(teacher‖student), nats per token") == ["0.0000", "0.6336 ± 0.0042", "1.0771 ± 0.0042"]
    assert row(markdown, "same likeliest token") == ["100.0%", "61.9% ± 0.2", "53.9% ± 0.2"]
    perplexity = content["divergence"]["hybrid"]["student_perplexity"]
    assert row(markdown, "perplexity")[:2] == ["16.42", f"{perplexity:.2f} (+{perplexity - 16.417:.2f} worse)"]
    assert row(markdown, "parameters")[:2] == ["134,515,008", "148,387,342"]
    assert row(markdown, "layers") == ["–", "23 KDA, 7 full attention", "30 KDA"]
    assert row(markdown, "hellaswag (acc\\_norm)")[:2] == ["40.9% ± 0.5", "39.1% ± 0.5 (−1.8 worse)"]
    last = content["speed"]
    for label, key in (("prefill", "prefill_tokens_per_second"), ("decoding", "decode_tokens_per_second")):
        cells = row(markdown, f"{label} at 64k tokens, tokens/s")
        teacher, student = (last[name][-1][key] for name in ("SmolLM2-135M", "hybrid"))
        assert cells[0].replace(",", "") == (f"{teacher:.0f}" if teacher >= 100 else f"{teacher:.1f}")
        assert cells[1].endswith(f"(×{student / teacher:.3g} better)")
    assert row(markdown, "first token at 64k tokens")[1].endswith("better)")  # less time
    assert row(markdown, "KV cache and state at 64k tokens")[1].endswith("(×0.236 better)")


def test_needles_are_means_over_tasks_and_depths_at_each_length():
    content = evaluation()
    markdown = table_of(content)
    for length in LENGTHS:
        found = [each for task in TASKS for each in content["needles"]["hybrid"][task] if each["length"] == length]
        share = sum(each["correct"] for each in found) / sum(each["total"] for each in found)
        samples = sum(each["total"] for each in found) + 1.96**2
        doubted = (sum(each["correct"] for each in found) + 1.96**2 / 2) / samples
        error = math.sqrt(doubted * (1 - doubted) / samples)
        label = f"at {length // 1024}k tokens" if length >= 1024 else f"at {length} tokens"
        cell = row(markdown, f"{label}, mean of 4 tasks")[1]
        assert cell.startswith(f"{100 * share:.1f}% ± {100 * error:.1f} (")


def test_tasks_that_one_model_lacks_are_not_averaged_with_the_others():
    content = evaluation(students=("hybrid",))
    del content["needles"]["hybrid"]["niah_single_1"]
    assert "mean of 3 tasks" in table_of(content)


@pytest.mark.parametrize(
    ("higher_is_better", "value", "note"),
    [
        (True, 0.60, "(+10.0 better)"),
        (True, 0.40, "(−10.0 worse)"),
        (False, 0.60, "(+10.0 worse)"),
        ({"acc": False}, 0.40, "(−10.0 better)"),
        (None, 0.40, "(−10.0)"),
        (True, 0.51, "(+1.0 ≈)"),
        (True, 0.50, "(0.0)"),
    ],
)
def test_direction_of_a_difference(higher_is_better, value, note):
    def task(share):
        metrics = {"acc,none": {"value": share, "standard_error": 0.01}}
        return {"mine": {"metrics": metrics, "samples": 2500, "version": 1, "higher_is_better": higher_is_better}}

    content = evaluation(students=("hybrid",), benchmarks={"SmolLM2-135M": task(0.5), "hybrid": task(value)})
    assert row(table_of(content), "mine (acc)")[1] == f"{100 * value:.1f}% ± 1.0 {note}"


def test_a_difference_of_what_has_no_error_is_never_chance():
    content = evaluation(students=("hybrid",))
    content["divergence"]["hybrid"]["student_perplexity"] = 16.40
    assert row(table_of(content), "perplexity")[1] == "16.40 (−0.02 better)"


def test_long_texts_are_shown(tmp_path):
    """Curves by position and by distance, the ends of both in the first table, all numbers below."""
    markdown = report_of(tmp_path, evaluation(("hybrid",)))
    assert row(markdown, "perplexity, 8k to 16k tokens") == ["11.00 ± 0.01", "12.67 ± 0.01 (+1.67 worse)"]
    assert row(markdown, "KL, 0 to 1k tokens") == ["–", "0.1000 ± 0.0100"]
    assert row(markdown, "last word right, 0 tokens between")[1] == "45.0% ± 3.0 (−5.0 ≈)"
    assert row(markdown, "hybrid, 4k tokens between")[:2] == ["18.0%", "1.0%"]
    pictures = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert {f"long-documents-{kind}-by-position.svg" for kind in ("perplexity", "kl")} <= pictures
    assert {"last-word-right.svg", "last-word-gain.svg"} <= pictures
    damaged = evaluation(("hybrid",))
    damaged["long_context"]["hybrid"] = {
        "documents": {"positions": [{"from": None}, 3]},
        "last_word": [{"distance": 0}],
    }
    assert "## Long texts" in report_of(tmp_path, damaged)


def test_only_sections_with_data(tmp_path):
    nothing = {suite: {} for suite in ("divergence", "generation", "benchmarks", "needles", "long_context", "speed")}
    markdown = report_of(tmp_path, evaluation(**nothing))
    assert re.findall("^## (.*)", markdown, re.MULTILINE) == ["Where the numbers come from"]
    markdown = report_of(tmp_path, evaluation(**{**nothing, "speed": {"SmolLM2-135M": speed(30, 1.0)}}))
    titles = ["Teacher and students", "Speed and memory", "Where the numbers come from"]
    assert re.findall("^## (.*)", markdown, re.MULTILINE) == titles


def test_missing_parts_are_dashes(tmp_path):
    content = evaluation()
    content["divergence"]["hybrid"] = {"kl": 0.5, "positions": [{"from": 0}], "layers": [{"layer": 1, "cosine": None}]}
    content["models"]["kda-only"] = {"role": "student"}
    content["needles"]["hybrid"]["niah_single_1"][0] = {"length": 512}
    content["speed"]["hybrid"] = [{"context": 65536}]
    content["benchmarks"]["hybrid"]["arc_easy"] = {"metrics": None}
    content["config"] = None
    for part in ("machine", "versions", "commit", "command"):
        del content[part]
    markdown = report_of(tmp_path, content)
    assert row(markdown, "same likeliest token")[1] == "–"
    assert row(markdown, "decoding at 64k tokens, tokens/s")[1] == "–"


def test_perplexity_that_overflowed_is_infinite(tmp_path):
    content = evaluation(students=("hybrid",), needles={}, speed={})
    content["divergence"]["hybrid"]["student_perplexity"] = math.inf
    content["divergence"]["hybrid"]["positions"][0]["student_perplexity"] = math.inf
    assert row(report_of(tmp_path, content), "perplexity")[1] == "∞"


def test_evaluations_are_merged_by_name_and_path():
    first = evaluation(students=("hybrid",), needles={}, speed={}, benchmarks={})
    second = evaluation(students=("hybrid",), divergence={}, speed={}, benchmarks={})
    third = evaluation(students=("hybrid",), needles={}, speed={}, benchmarks={})
    third["models"]["hybrid"]["path"] = "elsewhere/other"
    third["divergence"]["hybrid"]["kl"] = 0.1
    markdown = table_of(first, second, third)
    assert "|  | SmolLM2-135M (teacher) | hybrid (hybrid) | hybrid (other) |" in markdown
    assert row(markdown, "KL(teacher‖student), nats per token")[1:] == ["0.6336 ± 0.0042", "0.1000 ± 0.0042"]
    needle = row(markdown, "at 2k tokens, mean of 4 tasks")
    assert needle[1] != "–"
    assert needle[2] == "–"


def test_a_later_evaluation_replaces_what_it_measured_again(tmp_path):
    first, second = (evaluation(students=("hybrid",), needles={}) for _ in range(2))
    second["divergence"]["hybrid"] = divergence(kl=0.25)
    second["speed"]["hybrid"] = speed(7, 0.5)[:2]
    markdown = report_of(tmp_path, first, second)
    assert row(markdown, "KL(teacher‖student), nats per token")[1] == "0.2500 ± 0.0042"
    assert row(markdown, "hybrid, 64k")[1] == f"{first['speed']['hybrid'][-1]['decode_tokens_per_second']:.1f}"
    assert row(markdown, "hybrid, 256")[1] == f"{second['speed']['hybrid'][0]['decode_tokens_per_second']:.1f}"


def test_a_later_evaluation_adds_lengths_and_depths_to_needles():
    first, second = evaluation(students=("hybrid",)), evaluation(students=("hybrid",))
    second["needles"] = {
        name: {"niah_single_1": [{"length": 512, "depth": 0.5, "correct": 0, "total": 8}]} for name in first["needles"]
    }
    before = merge_models([Evaluation(Path("results.json"), first)])
    after = merge_models([Evaluation(Path("results.json"), each) for each in (first, second)])
    for earlier, later in zip(before, after, strict=True):
        assert score(later, ["niah_single_1"], 512, 0.5)[0] == 0
        assert score(later, ["niah_single_1"], 512, 0.25) == score(earlier, ["niah_single_1"], 512, 0.25)
        assert score(later, TASKS, 4096) == score(earlier, TASKS, 4096)


def test_a_mean_of_all_or_nothing_is_not_beyond_doubt():
    content = evaluation(students=("hybrid",))
    for name, correct in (("SmolLM2-135M", 2), ("hybrid", 1)):
        content["needles"][name] = {"niah_single_1": [{"length": 512, "depth": 0, "correct": correct, "total": 2}]}
    teacher, student = row(table_of(content), "at 512 tokens, niah\\_single\\_1")
    assert not teacher.endswith("± 0.0")
    assert student.endswith("(−50.0 ≈)")


def test_the_teachers_error_counts_too():
    content = evaluation(students=("hybrid",))
    content["divergence"]["hybrid"] |= {"student_perplexity": 16.6, "teacher_perplexity": 16.4}
    content["divergence"]["hybrid"]["standard_errors"] |= {"student_perplexity": 0.08, "teacher_perplexity": 0.08}
    assert row(table_of(content), "perplexity") == ["16.40 ± 0.08", "16.60 ± 0.08 (+0.20 ≈)"]


def test_requested_tasks_are_shown_and_subtasks_are_not():
    tasks = {name: scored(0.5, 0.5) for name in ("mmlu", "mmlu_history", "mmlu_pro", "gsm8k", "gsm8k_cot")}
    content = evaluation(students=("hybrid",), benchmarks={"hybrid": tasks})
    content["config"]["benchmarks"]["tasks"] = ["mmlu", "mmlu_pro", "gsm8k", "gsm8k_cot"]
    markdown = table_of(content)
    shown = [name.replace("\\", "") for name in re.findall(r"^\| (\S+) \(acc", markdown, re.MULTILINE)]
    assert shown == ["mmlu", "mmlu_pro", "gsm8k", "gsm8k_cot"]
    content["config"]["benchmarks"]["tasks"] = ["a_tag"]
    assert "mmlu\\_history" in table_of(content)


def test_questions_that_are_not_the_hubs_are_told(tmp_path):
    tasks = {"mmlu": {**scored(0.5, 0.5), "note": "MMLU-Redux"}, "arc_easy": scored(0.5, 0.5)}
    content = evaluation(students=("hybrid",), benchmarks={"SmolLM2-135M": tasks, "hybrid": tasks})
    content["config"]["benchmarks"]["tasks"] = ["mmlu", "arc_easy"]
    markdown = table_of(content)
    assert "(acc\\_norm, not the hub's) |" in markdown and "arc\\_easy (acc\\_norm) |" in markdown
    (section,) = benchmark_section(merge_models([Evaluation(tmp_path / "results.json", content)])).parts[1:-1]
    assert section == "mmlu is not the hub's: MMLU-Redux (SmolLM2-135M, hybrid)."


def test_models_with_almost_the_same_name_have_pictures_of_their_own(tmp_path):
    report_of(tmp_path, evaluation(students=("run-1", "run_1", "学生"), speed={}, divergence={}, benchmarks={}))
    markdown = (tmp_path / "report.md").read_text()
    named = re.findall(r'srcset="(pictures/needles-mean-of-4-tasks-of-[^"]*)"', markdown)
    assert len(named) == len(set(named)) == 4
    drawn = [ElementTree.parse(tmp_path / name).getroot().get("aria-label").split(":")[0] for name in named]
    assert drawn == ["SmolLM2-135M", "run-1", "run_1", "学生"]


def test_pictures_of_an_earlier_report_go_and_those_of_others_stay(tmp_path):
    report_of(tmp_path, evaluation())
    (tmp_path / "pictures/mine.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    report_of(tmp_path, evaluation(needles={}, divergence={}, benchmarks={}, long_context={}))
    left = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert "mine.svg" in left
    assert {name.split("-")[0] for name in left} == {"mine.svg", "speed"}


def test_a_trial_and_an_interrupted_evaluation_come_first(tmp_path):
    content = evaluation(finished=None, missing=[{"model": "hybrid", "suite": "speed", "task": ""}])
    content["config"] |= {"smoke": False, "limit": 5}
    lead = report_of(tmp_path, content).split("\n\n")[1].splitlines()
    assert lead[0] == "- Measured on at most 5 samples of each task."
    assert lead[1] == "- An evaluation was interrupted; results that are missing: 1."
    content["config"]["smoke"] = True
    assert report_of(tmp_path, content).split("\n\n")[1].startswith("- A smoke test")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"models": {"hybrid": "a path"}}, "models.hybrid is not a mapping"),
        ({"needles": {"hybrid": {"niah_single_1": [3]}}}, "needles.hybrid.niah_single_1.0 is not a mapping"),
        ({"benchmarks": {"hybrid": {"arc_easy": 0.5}}}, "benchmarks.hybrid.arc_easy is not a mapping"),
        ({"speed": {"hybrid": {}}}, "speed.hybrid is not a list"),
    ],
)
def test_a_damaged_file_is_an_error_of_one_line(tmp_path, changes, problem):
    with pytest.raises(UserError, match=f"is damaged: {re.escape(problem)}"):
        report_of(tmp_path, evaluation(**changes))


def test_strange_values_are_left_out(tmp_path):
    content = evaluation(students=("hybrid",))
    content["speed"]["hybrid"][0]["context"] = "256"
    content["benchmarks"]["hybrid"]["arc_easy"] = {"metrics": {"acc,none": 0.5}}
    content["benchmarks"]["hybrid"]["hellaswag"] = {"metrics": [1]}
    content["divergence"]["hybrid"]["standard_errors"] = [1]
    assert row(report_of(tmp_path, content), "hellaswag (acc\\_norm)")[1] == "–"


def test_run_before_and_after(tmp_path):
    folder = write_run(tmp_path / "run", results(), metrics())
    write_report([folder], tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert row(markdown, "KL(teacher‖student), nats per token") == ["3.5695", "0.6336", "−2.9359"]
    assert row(markdown, "same likeliest token") == ["18.0%", "61.9%", "+43.9"]
    assert row(markdown, "perplexity, teacher") == ["16.40", "16.40", ""]
    page = (tmp_path / "report.html").read_text()
    assert '<td class="better">−2.9359</td>' in page
    assert '<td class="better">+43.9</td>' in page


def test_a_run_that_got_worse_is_marked_worse(tmp_path):
    after = {**results()["divergence"]["after"], "kl": 9.0}
    content = results(divergence={"before": results()["divergence"]["before"], "after": after})
    write_report([write_run(tmp_path / "run", content, metrics())], tmp_path)
    assert '<td class="worse">+5.4305</td>' in (tmp_path / "report.html").read_text()


def test_phases_follow_one_another_along_the_tokens(tmp_path):
    folder = write_phases(tmp_path / "run")
    write_report([folder], tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert row(markdown, "alignment")[:6] == ["983,040", "30", "17.1 s", "57,488", "512", "0.001"]
    assert row(markdown, "distillation")[5:] == ["0.0003", "0.5 kl + 0.5 hs\\_cosine", "1.4000 → 0.6300"]
    loss, aligned = (
        ElementTree.parse(tmp_path / f"pictures/curve-{name}.svg").getroot() for name in ("loss", "attn-cosine")
    )
    assert loss.get("aria-label").endswith("at 2.95M")  # both phases' tokens
    assert aligned.get("aria-label").endswith("at 983k")
    assert {"alignment", "distillation"} <= set(loss.itertext())


def test_an_unfinished_run_and_a_line_cut_off_by_a_kill(tmp_path):
    folder = write_run(tmp_path / "run", results(), metrics())
    (folder / "results.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "lo')
    write_report([folder], tmp_path)
    assert "Not finished: 60 steps until now." in (tmp_path / "report.md").read_text()


def test_configuration_in_the_report_is_the_run(tmp_path):
    config = RunConfig.parse(
        {
            "model": "student",
            "teacher": {"kind": "hf", "path": "teacher"},
            "output_path": "runs/one",
            "sequence_length": 64,
            "dataset": {"train_dataset": {"disk_path": "text.jsonl"}, "eval_dataset": {"disk_path": "held_out.jsonl"}},
            "frozen_res": ["norm\\.weight"],
            "loss_functions": [{"function": "kl", "weight": 1, "temperature": 2.0}],
            "training_args": {"learning_rate": 1e-5, "max_steps": 3},
            "evaluation": {"prompts": ["`code` | <b>"]},
        }
    )
    folder = write_run(tmp_path / "run", results(config=config.model_dump(mode="json")), metrics())
    write_report([folder], tmp_path)
    blocks = re.findall("```yaml\n(.*?)\n```", (tmp_path / "report.md").read_text(), re.DOTALL)
    assert RunConfig.parse(yaml.safe_load(blocks[0])) == config


def test_text_of_the_files_stays_text(tmp_path):
    name = "<script>alert(1)</script> | `x` *y* $\\frac{1}{2}$ ]]>"
    sample = {"prompt": "```\n<script>alert(2)</script>", "continuation": "</code></pre><img src=x onerror=alert(3)>"}
    content = evaluation(students=(name,), speed={})
    content["failures"] = [{"model": name, "suite": "s", "task": "t", "error": "<b>\nsecond line | third"}]
    folders = [write_evaluation(tmp_path / "evaluation", content)]
    folders.append(
        write_run(tmp_path / "run", results(samples=[sample], config=run_config(project_name=name)), metrics())
    )
    write_report(folders, tmp_path)
    page, markdown = ((tmp_path / f"report.{kind}").read_text() for kind in ("html", "md"))
    read = Reader(page)
    assert not {"script", "img", "b"} & set(read.tags)
    assert "<script>alert(2)</script>" in "".join(read.text)
    assert "</code></pre><img src=x onerror=alert(3)>" in "".join(read.text)
    outside = re.sub(r"^(`{3,}).*?^\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert not re.search("<script|<b>|onerror", outside)
    widths = {
        line.count(" | ") for line in outside.splitlines() if line.startswith(("| KL", "| same", "| perplexity |"))
    }
    assert widths == {2, 3}  # columns are not split by the bar in the name: two models; before, after and change
    for picture in (tmp_path / "pictures").glob("*.svg"):
        ElementTree.parse(picture)


def test_page_is_whole_and_fetches_nothing(tmp_path):
    folders = [write_evaluation(tmp_path / "evaluation"), write_phases(tmp_path / "run")]
    write_report(folders, tmp_path)
    page = (tmp_path / "report.html").read_text()
    read = Reader(page)
    assert read.open == []
    assert all(each == "data:," or each.startswith("#") for each in read.fetched)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    identifiers = re.findall(r'\sid="([^"]*)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert "#ab00" not in page  # no placeholder of a colour is left


def test_pictures_of_the_markdown_are_there_in_both_themes(standard):
    markdown = (standard / "report.md").read_text()
    named = set(re.findall(r'(?:src|srcset)="([^"]+)"', markdown))
    assert {path.split("/")[0] for path in named} == {"pictures"}
    assert named == {f"pictures/{path.name}" for path in (standard / "pictures").iterdir()}
    for path in named:
        drawn = (standard / path).read_text()
        assert "#ab00" not in drawn
        assert ElementTree.fromstring(drawn).get("viewBox") == "0 0 400 250"
    assert (standard / "pictures/kl-by-position.svg").read_text() != (
        standard / "pictures/kl-by-position-dark.svg"
    ).read_text()


def test_heat_map_shows_each_length_and_depth(standard):
    root = ElementTree.parse(standard / "pictures/needles-niah-single-1-of-hybrid.svg").getroot()
    written = [text.strip() for text in root.itertext() if text.strip()]
    rows = needles(0.95)["niah_single_1"]
    for length in LENGTHS:
        assert f"{length // 1024}k" in written if length >= 1024 else str(length) in written
    for depth in (0, 25, 50, 75, 100):
        assert f"{depth} %" in written
    for each in rows:
        assert f"{100 * each['correct'] / each['total']:.0f}" in written
    assert "trained to 2k" in written


def test_commands_and_provenance(standard):
    markdown = (standard / "report.md").read_text()
    assert "```sh\ndistillkit evaluate evaluation.yaml\n```" in markdown
    assert row(markdown, "commit") == ["364fbb9c0ffee"]
    assert row(markdown, "device") == ["NVIDIA H100 80GB HBM3"]
    assert row(markdown, "seed: needles") == ["7"]


def test_failures_are_listed(tmp_path):
    failure = {"model": "hybrid", "suite": "benchmarks", "task": "gsm8k", "error": "OutOfMemoryError: 20 GiB\nat …"}
    markdown = report_of(tmp_path, evaluation(failures=[failure], needles={}, speed={}, divergence={}))
    assert row(markdown, "hybrid", "## Failures") == ["benchmarks", "gsm8k", "OutOfMemoryError: 20 GiB at …"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"kind": ', "is not JSON: Expecting value: line 1 column 10"),
        ("[1]", "holds no result of distillkit"),
        ('{"a": 1}', "holds no result of distillkit; name the output_path of a run or an evaluation"),
        ('{"kind": "distillkit-evaluation", "format": 99}', "has format 99, this version reads 1"),
    ],
)
def test_a_file_without_results_is_an_error_of_one_line(tmp_path, content, problem):
    path = tmp_path / "results.json"
    path.write_text(content)
    for named in (path, tmp_path):
        with pytest.raises(UserError, match=re.escape(problem)):
            read_results([named])


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="RESULTS: no such file or folder"):
        read_results([tmp_path / "nothing"])
    with pytest.raises(UserError, match=r"has no results\.json"):
        read_results([tmp_path])


def test_benchmark_records_with_a_curve_are_runs(tmp_path):
    path = Path(__file__).parents[2] / "benchmarks/results/smollm2_hybrid.json"
    report = build_report(read_results([path]))
    recorded = json.loads(path.read_text())
    assert f"{recorded['training']['tokens']:,} tokens" in report.parts[0].lines[0]
    assert [part.title for part in report.parts[1:]] == ["Training", "Where the numbers come from"]


def test_teachers_of_two_evaluations_are_not_compared_with():
    first, second = evaluation(students=("hybrid",)), evaluation(students=("kda-only",))
    second["models"]["SmolLM2-135M"] = model("teacher", "another/teacher")
    markdown = table_of(first, second)
    assert markdown.count("SmolLM2-135M (teacher) 2") > 0
    assert row(markdown, "hellaswag (acc\\_norm)")[2] == "39.1% ± 0.5"
