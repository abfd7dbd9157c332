"""Benchmarks are started by hand and rarely, so nothing else would notice that one has lost what it imports."""

import importlib
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from .smollm2 import needs_smollm2, smollm2_tokenizer

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
def benchmark():
    """A module by its name: they import each other by theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module


@pytest.fixture
def rewritten(benchmark):
    return benchmark("rewriting").rewritten


def numbered(count):
    """Documents of 5 to 40 tokens: as often as that its number, from 1, and a 0 that ends it."""
    lengths = np.random.default_rng(1).integers(5, 41, count)
    texts = [[number] * length + [0] for number, length in enumerate(lengths.tolist(), start=1)]
    return pa.table({"input_ids": pa.array(texts, pa.large_list(pa.uint16()))})


def marking(mark):
    """A writer that puts a token before the text, and does not care for the dtype."""

    def write(text, generator, most):
        document = np.concatenate([[mark], text])[:most]
        return document, len(document) - 1

    return write


def test_each_writer_gets_its_share_and_what_it_does_not_get_stays_as_it_was(rewritten):
    documents = numbered(400)
    changed = rewritten(documents, [(0.25, marking(1001)), (0.5, marking(1002))], seed=0)
    assert changed["input_ids"].type.value_type == pa.uint16()
    texts, made = documents["input_ids"].to_pylist(), changed["input_ids"].to_pylist()
    kept, first, second = ([text for text in made if text[0] in marks] for marks in (range(1001), [1001], [1002]))
    assert 70 < len(first) < 130 and 160 < len(second) < 240
    assert kept == [text for text in texts if text in kept]
    assert sorted(kept + [text[1:] for text in first + second]) == texts


def test_joined_documents_have_the_length_asked_for_and_nothing_is_lost(rewritten):
    documents = numbered(400)
    changed = rewritten(documents, [(0.25, marking(1001)), (0.5, marking(1002))], seed=0, together=100)
    assert changed["input_ids"].type.value_type == pa.uint16()
    texts, made = documents["input_ids"].to_pylist(), changed["input_ids"].to_pylist()
    kept = [text for text in texts if text in made]
    assert 60 < len(kept) < 140 and made[: len(kept)] == kept
    tokens = Counter(token for text in kept for token in text)
    for mark in (1001, 1002):
        own = [text for text in made if text[0] == mark]
        assert [len(text) for text in own[:-1]] == [100] * (len(own) - 1)
        joined = [token for text in own for token in text[1:]]
        assert joined == sorted(joined)
        tokens.update([*joined, *[0] * len(set(joined))])  # and what ended them
    assert tokens == Counter(token for text in texts for token in text)


def test_a_writer_whose_share_is_less_than_a_document_writes_none(rewritten):
    documents = numbered(3)
    assert rewritten(documents, [(1e-9, marking(1001))], seed=0, together=100) == documents


def test_passages_return_verbatim_from_within_reach_and_the_text_stays_in_order(benchmark):
    returning = benchmark("returning")
    text = np.arange(5000)  # no token twice: what comes again has returned
    document, used = returning.passages_that_return()(text, np.random.default_rng(0), None)
    assert used == len(text) and len(document) > 1.3 * len(text)
    last_seen: dict[int, int] = {}
    news, distances, again = [], [], 0
    for place, token in enumerate(document.tolist()):
        if token in last_seen:
            again += 1
            distances.append(place - last_seen[token])
        else:
            assert again == 0 or again >= returning.PASSAGE[0]
            again = 0
            news.append(token)
        last_seen[token] = place
    assert news == text.tolist()
    assert 1000 < max(distances) <= returning.REACH + returning.PASSAGE[1]


def test_entries_return_with_their_number_and_joined_documents_have_the_length_asked_for(benchmark, rewritten):
    documents = pa.table({"input_ids": [[*range(start, start + 300), -1] for start in range(0, 30000, 300)]})

    def entry(key, number):
        return np.concatenate([[-2], key, [-3], -10 - number, [-4]])

    writers = [(0.5, benchmark("returning").passages_that_return(entry))]
    by_themselves = rewritten(documents, writers, seed=0)["input_ids"].to_pylist()
    assert len(by_themselves) == 100 and all(document[-1] == -1 for document in by_themselves)
    changed = rewritten(documents, writers, seed=0, together=1000)["input_ids"].to_pylist()
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


@pytest.fixture(scope="module")
def words():
    """Each once, so that what stands in a document twice is told, asked or repeated; none with a digit."""
    vocabulary = smollm2_tokenizer().get_vocab().items()
    ids = sorted(place for token, place in vocabulary if re.fullmatch("Ġ[a-z]+", token))
    return np.random.default_rng(0).permutation(ids).astype(np.uint16)


def as_pattern(wording):
    """Of text in which a wording tells or asks for any fact."""
    pattern = re.escape(wording)
    for place, what in {"thing": r" \w+", "words": r"(?: \w+){1,3}", "number": r" \d{4,8}"}.items():
        escaped = re.escape(f"{{{place}}}")
        pattern = pattern.replace(escaped, f"(?P<{place}>{what})", 1).replace(escaped, f"(?P={place})")
    return pattern


def how_often(sequence, document):
    return np.all(np.lib.stride_tricks.sliding_window_view(document, len(sequence)) == sequence, axis=1).sum()


@needs_smollm2
def test_facts_are_told_before_they_are_asked_for_twice(benchmark, words):
    questions, tokenizer = benchmark("questions"), smollm2_tokenizer()
    write = questions.facts_asked_for(tokenizer)
    for seed in range(20):
        document, _ = write(words, np.random.default_rng(seed), 2048)
        text = tokenizer.decode(document)
        numbers = set(re.findall(r" \d{4,8}\.", text))
        assert 1 <= len(numbers) <= 2048 // questions.FACT_EVERY
        assert how_often(tokenizer.encode(" ", add_special_tokens=False), document) == 3 * len(numbers)
        for number in numbers:  # in the tokens of running text: the space, then digit by digit
            tokens = tokenizer.encode(number, add_special_tokens=False)
            assert len(tokens) == len(number) and how_often(tokens, document) == 3
        asked_for = Counter()
        for told, asked in questions.TOLD_AND_ASKED:
            for question in re.finditer(as_pattern(asked), text):
                fact, earlier = question.groupdict(), text[: question.start()]
                if told == asked and fact["number"] not in earlier:
                    continue  # here it is told
                assert told.format(**fact) in earlier
                asked_for[fact["number"] + "."] += 1
        assert asked_for == dict.fromkeys(numbers, 2)


@needs_smollm2
def test_facts_stand_in_running_text_or_in_a_stretch_of_it_over_and_over(benchmark, words):
    write = benchmark("questions").facts_asked_for(smollm2_tokenizer())
    runs = []
    for seed in range(20):
        document, used = write(words, np.random.default_rng(seed), 2048)
        assert len(document) == 2048 and document.dtype == words.dtype
        assert np.array_equal(document, write(words, np.random.default_rng(seed), 2048)[0])
        shown = np.isin(words[:used], document).mean()
        assert shown == 1 or shown < 0.2
        runs.append(shown == 1)
    assert 5 <= sum(runs) <= 15


@pytest.mark.parametrize(
    ("options", "mistake"),
    [
        ("--asked 0.5 --entries", "--entries are for documents in which passages return: give --returning"),
        ("--returning 0.5 --together 0", "--together is a number of tokens: at least 1"),
        ("--together 2048", "--together is for documents that are written anew: give --returning or --asked"),
        (
            "--returning 0.75 --asked 0.5",
            "--returning and --asked are shares of the documents: from 0 to 1, and together at most 1",
        ),
    ],
)
def test_a_corpus_is_not_made_with_options_that_contradict_each_other(
    benchmark, options, mistake, monkeypatch, capsys, tmp_path
):
    command = f"corpus.py --teacher none --data none.txt --output {tmp_path / 'tokens'} {options}"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as end:
        benchmark("corpus").main()
    assert end.value.code == 2 and mistake in capsys.readouterr().err


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
    assert benchmark("tabled").all_of("command", {"variants": {"a": found}}) == ["first", "second"]


def test_a_student_that_is_given_only_trains_in_long_rows_and_is_measured_before_and_after(benchmark, tmp_path, capsys):
    replication = benchmark("replication")
    paths = ["--teacher", "t", "--data", "d", "--eval", "e", "--work", str(tmp_path)]
    whole = replication.arguments([*paths, "--variants", "best_kda_only", "--long-tokens", "5M"])
    paths += ["--go-on", str(tmp_path)]
    args = replication.arguments([*paths, "--variants", "best_kda_only-more", "--long-tokens", "5M"])
    plan = replication.Replication(args)._plan("best_kda_only-more", tmp_path)
    run = plan["files"]["run.yaml"]
    assert run["phases"] == benchmark("variants").run_of("best_kda_only", tmp_path, whole)["phases"][-1:]
    assert [phase["name"] for phase in run["phases"]] == ["long"]
    assert run["student"] is None and run["model"] == str(tmp_path)
    students = plan["files"]["divergence-2048.yaml"]["students"]
    assert {name: each["path"] for name, each in students.items()} == {
        "short": str(tmp_path),
        "long": str(tmp_path / "run" / "phases" / "1-long"),
    }
    one = "--go-on is for one variant and its long rows"
    for mistake, told in (
        (["--variants", "best", "best_kda_only"], one),
        (["--variants", "teacher"], one),
        (["--variants", "best", "--long-tokens", "0"], one),
        (["--variants", "best", "--go-on", str(tmp_path / "none")], "--go-on: no folder"),
    ):
        with pytest.raises(SystemExit):
            replication.arguments([*paths, *mistake])
        assert told in capsys.readouterr().err


def test_trials_stand_in_the_order_of_their_tokens(benchmark):
    names = ["best_kda_only-185M-asked", "best-85M", "hybrid", "best_kda_only-85M", "best_kda_only"]
    expected = ["hybrid", "best-85M", "best_kda_only", "best_kda_only-85M", "best_kda_only-185M-asked"]
    assert sorted(names, key=benchmark("replication").place) == expected


@needs_smollm2
def test_a_document_too_short_for_a_fact_stays_as_it_is_and_others_keep_their_end(benchmark, words):
    write = benchmark("questions").facts_asked_for(smollm2_tokenizer())
    for length in (20, 150, 400):
        text = np.append(words[: length - 1], words.dtype.type(0))
        document, used = write(text, np.random.default_rng(0), None)
        assert len(document) == used == length and document[-1] == 0
        assert np.array_equal(document, text) == (length < 170)
