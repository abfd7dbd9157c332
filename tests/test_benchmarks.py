"""Benchmarks are started by hand and rarely, so nothing else would notice that one has lost what it imports."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

ASK_EACH_FOR_HELP = """
import runpy, sys, traceback
failed = []
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            failed.append(script)
    except Exception:
        traceback.print_exc()
        failed.append(script)
sys.exit(", ".join(failed) or 0)
"""


def test_every_benchmark_starts():
    scripts = sorted(map(str, BENCHMARKS.glob("*.py")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])}
    command = [sys.executable, "-c", ASK_EACH_FOR_HELP, *scripts]
    done = subprocess.run(command, cwd=BENCHMARKS, env=environment, capture_output=True, text=True)
    assert scripts and done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def returning():
    return runpy.run_path(str(BENCHMARKS / "returning.py"))


def test_passages_return_verbatim_from_within_reach_and_the_text_stays_in_order(returning):
    text = np.arange(5000)  # no token twice: what comes again has returned
    document, used = returning["written"](text, np.random.default_rng(0), None)
    assert used == len(text) and len(document) > 1.3 * len(text)
    last_seen: dict[int, int] = {}
    news, distances, again = [], [], 0
    for place, token in enumerate(document.tolist()):
        if token in last_seen:
            again += 1
            distances.append(place - last_seen[token])
        else:
            assert again == 0 or again >= returning["PASSAGE"][0]
            again = 0
            news.append(token)
        last_seen[token] = place
    assert news == text.tolist()
    assert 1000 < max(distances) <= returning["REACH"] + returning["PASSAGE"][1]


def test_entries_return_with_their_number_and_joined_documents_have_the_length_asked_for(returning):
    documents = pa.table({"input_ids": [[*range(start, start + 300), -1] for start in range(0, 30000, 300)]})

    def entry(key, number):
        return np.concatenate([[-2], key, [-3], -10 - number, [-4]])

    by_themselves = returning["with_returning_passages"](documents, 0.5, 0, None, entry)["input_ids"].to_pylist()
    assert len(by_themselves) == 100 and all(document[-1] == -1 for document in by_themselves)
    changed = returning["with_returning_passages"](documents, 0.5, 0, 1000, entry)["input_ids"].to_pylist()
    joined = [document for document in changed if document[-1] != -1]
    kept = len(changed) - len(joined)
    assert 30 < kept < 70 and all(len(document) == 301 for document in changed[:kept])
    assert [len(document) for document in joined[:-1]] == [1000] * (len(joined) - 1)
    assert not any(-1 in document for document in joined)
    lines = [tuple(line) for document in joined for line in entries_in(document)]
    assert 0.3 < len(set(lines)) / len(lines) < 0.7  # as many return as are new
    whole = [5 <= len(line) - line.index(-3) - 1 <= 8 and 2 <= line.index(-3) - 1 <= 4 for line in lines]
    assert sum(whole) > 0.7 * len(lines)  # a passage may cut an entry


def entries_in(document):
    """From each -2 to its -4."""
    start = None
    for place, token in enumerate(document):
        if token == -2:
            start = place
        elif token == -4 and start is not None:
            if document[start:place].count(-3) == 1:
                yield document[start:place]
            start = None
