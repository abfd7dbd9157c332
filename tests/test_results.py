"""docs/results.md, and tables of other pages, say what the files in benchmarks/results say: nobody types a number."""

import importlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from transformers import HfArgumentParser

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"


@pytest.fixture(scope="module")
def tables():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("tables")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_pages_are_what_their_script_makes_of_the_result_files(tables):
    pages = [path.read_text(encoding="utf-8") for path in tables.PAGES]
    for page in pages:
        assert tables.written(page)[0] == page, "run: python benchmarks/tables.py"
    shown = {name for page in pages for name in tables.SECTION.findall(page)}
    assert shown <= {*tables.SECTIONS, "conclusions", "contents"}
    assert {name for name in tables.SECTIONS if (tables.RESULTS / f"{name}.json").exists()} <= shown


def test_prose_has_no_measured_numbers(tables):
    prose = re.sub(
        r"`[^`]*`|\[[^]]*\]\([^)]*\)|AFM-4\.5B|4\.5B parameters", "", tables.SECTION.sub("", PAGE.read_text("utf-8"))
    )
    assert not re.findall(r"\d+\.\d+|\d+ ?%|\d+ ?(?:[GMk]iB|tokens/s|seconds|minutes)", prose)


def test_the_contents_list_every_heading_once_and_in_order(tables):
    page = PAGE.read_text(encoding="utf-8")
    headings = [heading for heading in re.findall(r"^##+ (.*)$", page, re.MULTILINE) if heading != "Contents"]
    links = re.findall(
        r"^ *- \[(.*)\]\(#(.*)\)$", page.split("<!-- contents -->")[1].split("<!-- end of")[0], re.MULTILINE
    )
    assert [name for name, _ in links] == headings and len(set(headings)) == len(headings)
    assert headings[0] == "Conclusions" and page.index("## Conclusions") < page.index("## Contents")


def test_conclusions_are_those_of_the_result_files(tables, tmp_path):
    def table(results):
        (part,) = importlib.import_module("conclusions").conclusions(results)
        return part.splitlines()[2:]

    lines = table(tables.RESULTS)
    assert len(lines) == 7 and "\n".join(lines) in PAGE.read_text(encoding="utf-8")
    for file in ("replication", "answers", "throughput", "decoding_afm", "serving_afm", "memory", "plan_times"):
        shutil.copy(tables.RESULTS / f"{file}.json", tmp_path)

    def changed(file, change):
        content = json.loads((tmp_path / f"{file}.json").read_text())
        change(content)
        (tmp_path / f"{file}.json").write_text(json.dumps(content))

    changed("replication", lambda each: each["variants"]["hybrid"]["divergence"]["2048"]["short"].update(kl=0.125))
    changed(
        "replication", lambda each: each["teacher"]["needles"]["niah_single_1"]["16384"].update(correct=5, total=20)
    )
    unparsed = {"unparsed": 0.123}
    changed("answers", lambda each: each["evaluations"][0]["generation"]["hybrid"]["choices"].update(unparsed))
    changed("throughput", lambda each: each["rows"][0].update(tokens_per_second=4321))
    changed("decoding_afm", lambda each: each["models"]["teacher"]["rows"][-1].update(kv_cache_bytes=3 * 2**30))
    changed("serving_afm", lambda each: each["rows"][-1].update(tokens_per_second=5432))
    changed("plan_times", lambda each: each["rows"][3].update(ratio=0.5))
    found = table(tmp_path)
    for line, now in zip(
        found,
        (
            "KL 0.125",
            "12.3% of answers",
            "25.0% at 16k",
            "4,321",
            "hybrid 5,432",
            "teacher: 3 GiB",
            "tokens/s within 50.0%",
        ),
        strict=True,
    ):
        assert now in line and line not in lines
    (tmp_path / "plan_times.json").unlink()
    assert table(tmp_path) == found[:6]


def test_files_that_the_page_and_the_notes_name_exist(tables):
    notes = [note for file in tables.RESULTS.glob("*.json") for note in all_notes(json.loads(file.read_text("utf-8")))]
    assert notes
    for text in [PAGE.read_text(encoding="utf-8"), *notes]:
        for path in re.findall(r"(?<![\w./-])(?:distillkit|recipes|benchmarks|tests|scripts|docs)/[\w./-]*\w", text):
            assert (ROOT / path).exists(), path


def all_notes(content):
    """Of a result file and its parts."""
    if isinstance(content, list):
        return [note for each in content for note in all_notes(each)]
    if not isinstance(content, dict):
        return []
    own = [content["note"]] if isinstance(content.get("note"), str) else []
    return own + [note for each in content.values() for note in all_notes(each)]


def test_commands_on_the_page_have_options_that_exist(tables):
    frame = importlib.import_module("frame")
    page = PAGE.read_text(encoding="utf-8")
    commands = re.findall(r"^python benchmarks/\w+\.py.*$", page, re.MULTILINE) + re.findall(
        r"`(python benchmarks/\w+\.py[^`\n]*)`", page
    )
    assert len(commands) > 20
    for command in commands:
        script, *words = shlex.split(command)[1:]
        module = importlib.import_module(Path(script).stem)
        options = [
            each
            for each in vars(module).values()
            if isinstance(each, type) and each.__module__ == module.__name__ and issubclass(each, frame.Options)
        ]
        if options and module.__name__ != "parity":  # whose words go to pytest
            HfArgumentParser(options).parse_args(words)  # exits where an option or a choice is unknown


def test_pictures_are_those_of_the_result_files(tables):
    page = PAGE.read_text(encoding="utf-8")
    drawn = {
        f"{tables.PICTURES}/{picture.name}{end}.svg": tables.paint(picture.svg, mode)
        for picture in tables.written(page)[1]
        for end, mode in (("", "light"), ("-dark", "dark"))
    }
    assert set(re.findall(r'(?:src|srcset)="([^"]+)"', page)) == set(drawn)
    for path, svg in drawn.items():
        assert (PAGE.parent / path).read_text(encoding="utf-8") == svg, "run: python benchmarks/tables.py"


def phase(name, tokens, length, kl):
    return {
        "name": name,
        "tokens": tokens,
        "tokens_per_second": 1000,
        "sequence_length": length,
        "divergence": {"before": {"kl": 3.0}},
        "held_out": [{"tokens": 0, "kl": 3.0}, {"tokens": tokens, "kl": kl}],
    }


def variant(kl, found_at_1k, found_at_2k):
    of_students = {name: {"kl": kl, "agreement": 0.5, "positions": []} for name in ("short", "long")}
    found = {"1024": {"correct": found_at_1k, "total": 4}, "2048": {"correct": found_at_2k, "total": 4}}
    return {
        "phases": [phase("short", 3000, 512, kl), phase("long", 1000, 1024, kl)],
        "divergence": {"512": of_students, "1024": of_students},
        "trained_length": {"short": 512, "long": 1024},
        "needles": {name: {"niah_single_1": found} for name in ("short", "long")},
    }


def test_claims_follow_the_measured_order_and_a_failed_variant_keeps_its_error(tables, tmp_path):
    variants = {"hybrid": variant(0.25, 4, 1), "kda_only": variant(0.5, 0, 0), "front_loaded": variant(0.4, 4, 0)}
    content = {"variants": {**variants, "best": {"error": "out of memory"}}, "command": "made up"}
    (tmp_path / "replication.json").write_text(json.dumps(content))
    page, pictures = tables.written("<!-- replication -->\n<!-- end of replication -->", tmp_path)
    assert "| yes | KL hybrid 0.250 < front-loaded 0.400 < KDA only 0.500 |" in page  # the hybrid beats KDA alone
    assert "| no | KL hybrid 0.250 < front-loaded 0.400 < KDA only 0.500 |" in page  # front-loaded is not worst
    assert "| KL of about 0.2 after some 300M tokens | no | 0.250 after 3k tokens (hybrid) |" in page
    assert "| hybrid | single needles in noise | 1k | 100.0% | 25.0% | – |" in page
    assert "Nothing from the trained length on: KDA only (single needles in noise)." in page
    assert "hybrid, closest recipe: out of memory" in page
    assert {picture.name for picture in pictures} == {"replication-kl", "replication-single"}


def test_a_section_without_its_file_is_left_out(tables, tmp_path):
    page = "Before.\n\n<!-- throughput -->\n\n## Old\n\n<!-- end of throughput -->\n\nAfter."
    assert tables.written(page, tmp_path)[0] == (
        "Before.\n\n<!-- throughput -->\n\n<!-- end of throughput -->\n\nAfter."
    )
