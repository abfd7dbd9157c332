"""docs/results.md says what the files in benchmarks/results say: nobody types a number."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"


@pytest.fixture(scope="module")
def tables():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("tables")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_the_page_is_what_its_script_makes_of_the_result_files(tables):
    page = PAGE.read_text(encoding="utf-8")
    assert tables.written(page)[0] == page, "run: python benchmarks/tables.py"
    assert set(tables.SECTION.findall(page)) == set(tables.SECTIONS)


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
    assert "| yes: KL hybrid 0.250 < front-loaded 0.400 < KDA only 0.500 |" in page  # the hybrid beats KDA alone
    assert "| no: KL hybrid 0.250 < front-loaded 0.400 < KDA only 0.500 |" in page  # front-loaded is not worst
    assert "| KL of about 0.2 after some 300M tokens | 0.250 after 3k tokens (hybrid) |" in page
    assert "trained to 1k: single needles in noise 100.0% at 1k, 25.0% at 2k (largest step down at 2k)" in page
    assert "trained to 1k: single needles in noise none from 1k on |" in page
    assert "hybrid, best recipe: out of memory" in page
    assert {picture.name for picture in pictures} == {"replication-kl", "replication-single"}


def test_a_section_without_its_file_is_left_out(tables, tmp_path):
    page = "Before.\n\n<!-- throughput -->\n\n## Old\n\n<!-- end of throughput -->\n\nAfter."
    assert tables.written(page, tmp_path)[0] == (
        "Before.\n\n<!-- throughput -->\n\n<!-- end of throughput -->\n\nAfter."
    )
