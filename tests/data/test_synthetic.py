"""Text that asks for what stood long before: which documents are rewritten, and what holds in each of them."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from distillkit.config.data import DatasetSource
from distillkit.config.errors import UserError
from distillkit.config.synthetic import SyntheticTextConfig
from distillkit.data import build_dataset
from distillkit.data.rows import list_entries
from distillkit.data.sources import load_source
from distillkit.data.synthetic import QuestionsAboutFacts, RepeatedPassages, rewrite_documents, synthesize, write_parts
from distillkit.data.synthetic import facts as facts_module
from distillkit.data.synthetic import passages as passages_module
from tests.smollm2 import needs_smollm2, smollm2_tokenizer

ROOT = Path(__file__).parents[2]


def numbered(count):
    """Documents of 5 to 40 tokens: as often as that its number, from 1, and a 0 that ends it."""
    lengths = np.random.default_rng(1).integers(5, 41, count)
    texts = [[number] * length + [0] for number, length in enumerate(lengths.tolist(), start=1)]
    return pa.table({"input_ids": pa.array(texts, pa.large_list(pa.uint16()))})


def marking(mark):
    """A rewriter that puts a token before the text, and does not care for the dtype."""

    def rewrite(text, generator, limit):
        document = np.concatenate([[mark], text])[:limit]
        return document, len(document) - 1

    return rewrite


def test_each_rewriter_gets_its_share_and_the_other_documents_stay_as_they_are():
    documents = numbered(400)
    changed = rewrite_documents(documents, [(0.25, marking(1001)), (0.5, marking(1002))], seed=0)
    assert changed["input_ids"].type.value_type == pa.uint16()
    texts, made = documents["input_ids"].to_pylist(), changed["input_ids"].to_pylist()
    kept, first, second = ([text for text in made if text[0] in marks] for marks in (range(1001), [1001], [1002]))
    assert 70 < len(first) < 130 and 160 < len(second) < 240
    assert kept == [text for text in texts if text in kept]
    assert sorted(kept + [text[1:] for text in first + second]) == texts


def test_joined_documents_have_the_given_length_and_nothing_is_lost():
    documents = numbered(400)
    changed = rewrite_documents(documents, [(0.25, marking(1001)), (0.5, marking(1002))], seed=0, document_length=100)
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


def test_a_rewriter_whose_share_is_less_than_a_document_gets_none():
    documents = numbered(3)
    assert rewrite_documents(documents, [(1e-9, marking(1001))], seed=0, document_length=100) == documents


def test_the_seed_decides_which_documents_are_rewritten():
    documents = numbered(400)

    def marked(seed):
        return rewrite_documents(documents, [(0.5, marking(1001))], seed)["input_ids"].to_pylist()

    assert marked(3) == marked(3) != marked(4)


def test_passages_return_verbatim_from_within_reach_and_the_text_stays_in_order():
    text = np.arange(5000)  # no token twice: what comes again has returned
    document, used = RepeatedPassages()(text, np.random.default_rng(0), None)
    assert used == len(text) and len(document) > 1.3 * len(text)
    assert np.array_equal(document, RepeatedPassages()(text, np.random.default_rng(0), None)[0])
    last_seen: dict[int, int] = {}
    news, distances, again = [], [], 0
    for place, token in enumerate(document.tolist()):
        if token in last_seen:
            again += 1
            distances.append(place - last_seen[token])
        else:
            assert again == 0 or again >= passages_module.PASSAGE[0]
            again = 0
            news.append(token)
        last_seen[token] = place
    assert news == text.tolist()
    assert 1000 < max(distances) <= passages_module.REACH + passages_module.PASSAGE[1]


def test_entries_return_with_their_number_and_joined_documents_have_the_given_length():
    documents = pa.table({"input_ids": [[*range(start, start + 300), -1] for start in range(0, 30000, 300)]})

    def entry(key, number):
        return np.concatenate([[-2], key, [-3], -10 - number, [-4]])

    rewriters = [(0.5, RepeatedPassages(entry))]
    by_themselves = rewrite_documents(documents, rewriters, seed=0)["input_ids"].to_pylist()
    assert len(by_themselves) == 100 and all(document[-1] == -1 for document in by_themselves)
    changed = rewrite_documents(documents, rewriters, seed=0, document_length=1000)["input_ids"].to_pylist()
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
    """Each once, so that what stands in a document twice is stated, asked for or repeated; none with a digit."""
    vocabulary = smollm2_tokenizer().get_vocab().items()
    ids = sorted(place for token, place in vocabulary if re.fullmatch("Ġ[a-z]+", token))
    return np.random.default_rng(0).permutation(ids).astype(np.uint16)


def as_pattern(wording):
    """Of text in which a wording states or asks for any fact."""
    pattern = re.escape(wording)
    for place, what in {"thing": r" \w+", "words": r"(?: \w+){1,3}", "number": r" \d{4,8}"}.items():
        escaped = re.escape(f"{{{place}}}")
        pattern = pattern.replace(escaped, f"(?P<{place}>{what})", 1).replace(escaped, f"(?P={place})")
    return pattern


def how_often(sequence, document):
    return np.all(np.lib.stride_tricks.sliding_window_view(document, len(sequence)) == sequence, axis=1).sum()


@needs_smollm2
def test_facts_are_stated_before_they_are_asked_for_twice(words):
    tokenizer = smollm2_tokenizer()
    rewrite = QuestionsAboutFacts(tokenizer)
    for seed in range(20):
        document, _ = rewrite(words, np.random.default_rng(seed), 2048)
        text = tokenizer.decode(document)
        numbers = set(re.findall(r" \d{4,8}\.", text))
        assert 1 <= len(numbers) <= 2048 // facts_module.TOKENS_PER_FACT
        assert how_often(tokenizer.encode(" ", add_special_tokens=False), document) == 3 * len(numbers)
        for number in numbers:  # in the tokens of running text: the space, then digit by digit
            tokens = tokenizer.encode(number, add_special_tokens=False)
            assert len(tokens) == len(number) and how_often(tokens, document) == 3
        asked_for = Counter()
        for statement, asked in facts_module.STATEMENTS_AND_QUESTIONS:
            for question in re.finditer(as_pattern(asked), text):
                fact, earlier = question.groupdict(), text[: question.start()]
                if statement == asked and fact["number"] not in earlier:
                    continue  # here it is stated
                assert statement.format(**fact) in earlier
                asked_for[fact["number"] + "."] += 1
        assert asked_for == dict.fromkeys(numbers, 2)


@needs_smollm2
def test_facts_stand_in_running_text_or_in_a_stretch_of_it_over_and_over(words):
    rewrite = QuestionsAboutFacts(smollm2_tokenizer())
    runs = []
    for seed in range(20):
        document, used = rewrite(words, np.random.default_rng(seed), 2048)
        assert len(document) == 2048 and document.dtype == words.dtype
        assert np.array_equal(document, rewrite(words, np.random.default_rng(seed), 2048)[0])
        shown = np.isin(words[:used], document).mean()
        assert shown == 1 or shown < 0.2
        runs.append(shown == 1)
    assert 5 <= sum(runs) <= 15


@needs_smollm2
def test_a_document_too_short_for_a_fact_stays_as_it_is_and_others_keep_their_end(words):
    rewrite = QuestionsAboutFacts(smollm2_tokenizer())
    for length in (20, 150, 400):
        text = np.append(words[: length - 1], words.dtype.type(0))
        document, used = rewrite(text, np.random.default_rng(0), None)
        assert len(document) == used == length and document[-1] == 0
        assert np.array_equal(document, text) == (length < 170)


def test_parts_are_few_and_no_larger_than_allowed(tmp_path):
    random = np.random.default_rng(0).integers(60000, size=(40, 500)).astype(np.uint16)  # hardly compressible
    documents = pa.table({"input_ids": pa.array(list(random), pa.large_list(pa.uint16()))})
    paths = write_parts(documents, tmp_path, max_bytes=12_000)
    assert [path.name for path in paths] == [f"part-{part:02}.parquet" for part in range(len(paths))]
    assert 4 <= len(paths) <= 6 and all(path.stat().st_size <= 12_000 for path in paths)
    assert pa.concat_tables(map(pq.read_table, paths)) == documents
    assert len(write_parts(documents, tmp_path / "one", max_bytes=60_000)) == 1
    uneven = pa.table({"input_ids": pa.array([[1] * length for length in (9, 500, 8)], pa.large_list(pa.uint16()))})
    paths = write_parts(uneven, tmp_path / "undivided", max_bytes=1)  # a document is not divided, no file is empty
    assert 1 < len(paths) <= 3 and all(pq.read_metadata(path).num_rows for path in paths)
    assert pa.concat_tables(map(pq.read_table, paths)) == uneven


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tokenizer, and a text: the licence from every paragraph on, then each paragraph by itself."""
    folder = tmp_path_factory.mktemp("inputs")
    smollm2_tokenizer().save_pretrained(folder / "tokenizer")
    paragraphs = [each for each in re.split(r"\n\s*\n", (ROOT / "LICENSE").read_text()) if each.strip()]
    texts = ["\n\n".join(paragraphs[start:] + paragraphs[:start]) for start in range(len(paragraphs))]
    lines = [json.dumps({"text": text}) for text in texts + paragraphs]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def synthetic(inputs, output, **settings):
    config = {"tokenizer": {"path": str(inputs / "tokenizer")}, "dataset": {"disk_path": str(inputs / "text.jsonl")}}
    return synthesize(
        SyntheticTextConfig.parse({**config, "output_path": str(output), **settings}), Console(quiet=True)
    )


BOTH = {"repeated_passages": {"share": 0.25, "entries": True}, "questions_about_facts": {"share": 0.45}}


@needs_smollm2
@pytest.mark.parametrize(
    ("settings", "documents", "sha256"),
    [
        ({}, 66, "e51136ac5b833256"),
        ({**BOTH, "document_length": 2047}, 56, "f93bb6211d2b5f86"),
        (
            {
                "repeated_passages": {"share": 0.2, "entries": True},
                "questions_about_facts": {"share": 0.4},
                "document_length": 500,
                "seed": 1,
                "max_file_mib": 0.02,
            },
            158,
            "5915e6303c54d70a",
        ),
        (
            {"repeated_passages": {"share": 0.3}, "questions_about_facts": {"share": 0.3}, "seed": 3},
            66,
            "930bd318ddee82db",
        ),
        ({"repeated_passages": {"share": 0.6}}, 66, "c63c6b7d287b0b33"),
    ],
)
def test_the_same_settings_and_seed_give_the_text_of_the_published_runs(inputs, tmp_path, settings, documents, sha256):
    paths = synthetic(inputs, tmp_path / "text", **settings)
    lengths, ids = list_entries(pa.concat_tables(map(pq.read_table, paths))["input_ids"])
    assert ids.type == pa.uint16()
    found = hashlib.sha256(lengths.astype("<i4").tobytes() + ids.to_numpy().astype("<i4").tobytes())
    assert (len(lengths), found.hexdigest()[:16]) == (documents, sha256)


@needs_smollm2
def test_the_folder_is_a_dataset_and_its_settings_make_the_same_files_again(inputs, tmp_path):
    (path,) = synthetic(inputs, tmp_path / "one", **BOTH, document_length=300)
    rows = load_source(DatasetSource(disk_path=str(tmp_path / "one")))
    assert len(rows) == pq.read_metadata(path).num_rows and rows.column_names == ["input_ids"]
    packed = build_dataset(DatasetSource(disk_path=str(tmp_path / "one")), smollm2_tokenizer(), 300, seed=0)
    assert sum(map(len, packed["input_ids"])) == sum(map(len, rows["input_ids"]))
    from distillkit.config.synthetic import load_synthetic_config

    again = load_synthetic_config(tmp_path / "one" / "synthesis.yaml", [f"output_path={tmp_path / 'two'}"])
    (other,) = synthesize(again, Console(quiet=True))
    assert other.read_bytes() == path.read_bytes()


@needs_smollm2
def test_a_dataset_without_text_is_refused_and_leaves_no_folder(inputs, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match=r"^dataset: holds no text$"):
        synthetic(inputs, tmp_path / "out", dataset={"disk_path": str(tmp_path / "empty.jsonl")})
    assert [path.name for path in tmp_path.iterdir()] == ["empty.jsonl"]
