"""Numbers of long texts are those of plain forwards over whole texts, in float64; memory does not grow with them."""

import json
import math

import pytest
import torch

from distillkit.config.errors import UserError
from distillkit.config.evaluate import EvaluateConfig, LongContextConfig
from distillkit.evaluation import evaluate
from distillkit.evaluation.generation import can_fork, score_continuations
from distillkit.evaluation.long_context import (
    Passage,
    check_texts,
    measure_documents,
    measure_last_words,
    read_documents,
    split_passage,
)

from ..student.students import VOCABULARY, student, tokens
from ..training.tiny import BYTES, llama, save_llama
from ..training.tiny import tokenizer as byte_tokenizer
from .largest_tensor import LargestTensor

PROSE = [f"Page {page} begins here. " + "It has little to say, but it says it again. " * page for page in range(1, 30)]


def settings(tmp_path=None, **changes):
    source = {"disk_path": "x"}
    if tmp_path is not None:
        source = {"disk_path": save(tmp_path / "prose.jsonl", PROSE)}
    return LongContextConfig.parse({"dataset": source, **changes})


def save(path, texts):
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


def models(layout):
    """A teacher and a student."""
    own = llama(5, vocab=VOCABULARY) if layout is None else student(layout=layout)
    return llama(1, vocab=VOCABULARY).double(), own.double()


def in_float64(model, ids):
    return model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)


@pytest.mark.parametrize("layout", [None, "hybrid", "kda_only"])
@pytest.mark.parametrize("piece", [7, 64, 1000])
@torch.no_grad()
def test_documents_by_position(layout, piece, monkeypatch):
    monkeypatch.setattr("distillkit.evaluation.long_context.CHUNK_BYTES", 9 * 4 * VOCABULARY * 5)  # 5 tokens
    teacher, own = models(layout)
    documents = [tokens(1, 50, seed=seed)[0].remainder(100).tolist() for seed in range(3)]
    asked = settings(length=50, position_buckets=[0, 3, 16, 100], prefill_tokens=piece)
    told = []
    found = measure_documents(
        own, documents, asked, teacher=teacher, columns=100, progress=lambda *done: told.append(done)
    )
    per_token = {}
    for document in documents:
        p, q = (
            model(torch.tensor([document]), use_cache=False).logits[0, :, :100].log_softmax(-1)
            for model in (teacher, own)
        )
        for position in range(1, 50):
            p_here, q_here = p[position - 1], q[position - 1]
            kl = (p_here.exp() * (p_here - q_here)).sum().item()
            same = bool(p_here.argmax() == q_here.argmax())
            per_token.setdefault(position, []).append((-q_here[document[position]].item(), kl, same))
    assert (found["documents"], found["tokens"]) == (3, 3 * 49)
    assert [(row["from"], row["to"], row["tokens"]) for row in found["positions"]] == [
        (0, 3, 6),
        (3, 16, 39),
        (16, 50, 102),
    ]
    for row in found["positions"]:
        here = [each for position in range(row["from"], row["to"]) for each in per_token.get(position, [])]
        nll, kl, same = (sum(column) / len(here) for column in zip(*here, strict=True))
        assert (row["perplexity"], row["kl"], row["agreement"]) == pytest.approx((math.exp(nll), kl, same), rel=1e-9)
    assert told[-1] == (150, 150)


def test_the_error_is_that_of_documents():
    own = llama(0)
    documents = [tokens(1, 20, seed=seed)[0].remainder(90).tolist() for seed in range(4)]
    asked = settings(length=20, position_buckets=[0])
    (row,) = measure_documents(own, documents, asked)["positions"]
    left_out = [
        measure_documents(own, documents[:index] + documents[index + 1 :], asked)["positions"][0]["perplexity"]
        for index in range(4)
    ]
    mean = sum(left_out) / 4
    error = math.sqrt(3 / 4 * sum((each - mean) ** 2 for each in left_out))
    assert row["standard_errors"]["perplexity"] == pytest.approx(error, rel=1e-4)
    assert set(row) == {"from", "to", "tokens", "perplexity", "standard_errors"}


def test_memory_does_not_grow_with_documents_times_vocabulary(monkeypatch):
    monkeypatch.setattr("distillkit.evaluation.long_context.CHUNK_BYTES", 9 * 4 * 4096 * 8)  # 8 tokens
    own, teacher = (llama(seed, vocab=4096, hidden_size=8) for seed in (0, 1))
    documents = [tokens(1, 512)[0].tolist()]
    with LargestTensor() as largest:
        measure_documents(own, documents, settings(length=512, prefill_tokens=32), teacher=teacher)
    assert largest.elements <= max(8 * 4096, 4 * 32 * 512)  # a chunk's logits; scores of one layer of attention


@pytest.mark.parametrize("layout", [None, "hybrid", "front_loaded", "kda_only"])
@torch.no_grad()
def test_continuations_of_one_context_are_scored_as_if_each_were_alone(layout):
    """In float32; contexts and continuations of unequal length, read in pieces or whole."""
    own = llama(3, vocab=VOCABULARY) if layout is None else student(layout=layout)
    contexts = [tokens(1, length, seed=length)[0].tolist() for length in (5, 70, 3, 12)]
    lengths = [[1, 9, 4], [2], [1, 1], [7, 7, 1, 3]]
    options = [[tokens(1, n, seed=10 * n + place)[0].tolist() for place, n in enumerate(each)] for each in lengths]
    options[0][0] = [int(own(torch.tensor([contexts[0]])).logits[0, -1].argmax())]
    assert can_fork(own)
    for size, piece in ((1, None), (3, 8)):
        found = score_continuations(own, contexts, options, batch_size=size, tokens_at_a_time=piece)
        for context, continuations, scores in zip(contexts, options, found, strict=True):
            for continuation, score in zip(continuations, scores, strict=True):
                logits = own(torch.tensor([context + continuation]), use_cache=False).logits[0, len(context) - 1 : -1]
                wanted = torch.tensor(continuation)
                expected = logits.log_softmax(-1).gather(-1, wanted[:, None]).double().sum().item()
                assert score.log_probability == pytest.approx(expected, rel=1e-5, abs=1e-5)
                assert score.likeliest == bool((logits.argmax(-1) == wanted).all())
    assert found[0][0].likeliest


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("He slept. She took the key", ("He slept. ", "She took the", "key")),
        ('"Who?" he asked. It was he', ('"Who?" he asked. ', "It was", "he")),
        ("He slept. Well", None),
        ("It was late. He slept. Well", None),
        ("It was late. He slept.  Well", None),
        ("It was late. He slept\nwell", None),
        ('One. "Two!" Three said four\n', ('One. "Two!" ', "Three said", "four")),
        ("One sentence alone", None),
        ("", None),
    ],
)
def test_parts_of_a_passage(text, parts):
    found = split_passage(text)
    assert found == (None if parts is None else Passage(*parts))


@pytest.mark.parametrize("distance", [0, 40])
@torch.no_grad()
def test_last_words(distance, tmp_path, monkeypatch):
    """A plain forward for every passage, with and without its beginning; so many tokens are between."""
    asked_of_model = []
    monkeypatch.setattr(
        "distillkit.evaluation.long_context.score_continuations",
        lambda model, contexts, *rest, **options: (
            asked_of_model.extend(contexts) or score_continuations(model, contexts, *rest, **options)
        ),
    )
    texts = [f"The {name} is red. I like the {name}" for name in ("door", "cat", "sea", "moon", "hat")]
    passages = {"disk_path": save(tmp_path / "passages.jsonl", [*texts, "nothing"])}
    asked = settings(tmp_path, passages=passages, distances=[distance, 80], batch_size=2, prefill_tokens=32)
    own, tokenizer = llama(0, vocab=BYTES).double(), byte_tokenizer()
    found = measure_last_words(own, tokenizer, asked, distance)
    assert (found["distance"], found["passages"]) == (distance, 5)
    prompts = [tokenizer.decode(context) for context in asked_of_model]
    likely = []
    for prompt, without in zip(prompts[::2], prompts[1::2], strict=True):
        name = prompt[4:].split(" ")[0]
        beginning, sentence = (f"The {name} is red.", "I like the")
        if distance:
            start, between, end = prompt.split("\n\n")
            assert (start, end) == (beginning, sentence) and without == f"{between}\n\n{sentence}"
            assert distance - 1 <= len(between) <= distance and between in " ".join(" ".join(PROSE).split())
        else:
            assert (prompt, without) == (f"{beginning} {sentence}", sentence)
        for text in (prompt, without):
            before, ids = (tokenizer(each)["input_ids"] for each in (text, f"{text} {name}"))
            logits = in_float64(own, ids)
            likely.append(sum(logits[at - 1, ids[at]].item() for at in range(len(before), len(ids))))
    assert found["log_probability"] == pytest.approx(sum(likely[::2]) / 5)
    assert found["log_probability_without"] == pytest.approx(sum(likely[1::2]) / 5)
    assert found["gain"] == pytest.approx((sum(likely[::2]) - sum(likely[1::2])) / 5)
    assert measure_last_words(own, tokenizer, asked, distance, limit=2)["passages"] == 2


def test_documents_that_are_long_enough(tmp_path):
    asked = settings(tmp_path, length=300, documents=5)
    documents = read_documents(asked, byte_tokenizer())
    assert [len(each) for each in documents] == [300] * 5
    assert all(byte_tokenizer().decode(each) in {text[:300] for text in PROSE} for each in documents)
    assert read_documents(asked, byte_tokenizer(), limit=2) == documents[:2]
    assert read_documents(asked.model_copy(update={"seed": 1}), byte_tokenizer()) != documents


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"length": 9999}, r"long_context\.length: no document of the text has 9,999 tokens; lower it"),
        ({"length": 9, "text_field": "words"}, r"long_context\.dataset: .* no column 'words'; its columns are text"),
        ({"length": 9, "passages": ["One sentence"]}, r"long_context\.passages: has no text of two sentences"),
    ],
)
def test_texts_that_cannot_be_measured_are_told_before_models_are_loaded(changes, line, tmp_path):
    if "passages" in changes:
        changes = {**changes, "passages": {"disk_path": save(tmp_path / "passages.jsonl", changes["passages"])}}
    with pytest.raises(UserError, match=line):
        check_texts(settings(tmp_path, **changes, position_buckets=[0]))


def test_an_evaluation_of_it(tmp_path):
    """The teacher beside itself is the same; without KL the teacher is not needed beside the student."""
    save_llama(tmp_path / "teacher", 0)
    save_llama(tmp_path / "far", 1)
    asked = {
        "dataset": {"disk_path": save(tmp_path / "prose.jsonl", PROSE)},
        "length": 200,
        "documents": 3,
        "position_buckets": [0, 64, 128],
        "passages": {"disk_path": save(tmp_path / "passages.jsonl", ["The sea is red. I like the sea"] * 3)},
        "distances": [0, 32],
    }

    def run(**changes):
        keys = {
            "output_path": str(tmp_path / "out"),
            "teacher": {"path": str(tmp_path / "teacher")},
            "students": {
                name: {"path": str(tmp_path / path)} for name, path in {"same": "teacher", "far": "far"}.items()
            },
            "long_context": {**asked, **changes},
        }
        return evaluate(EvaluateConfig.parse(keys))

    found = run()
    assert found["failures"] == []
    teacher, same, far = (found["long_context"][name] for name in ("teacher", "same", "far"))
    for own, base, other in zip(*(each["documents"]["positions"] for each in (same, teacher, far)), strict=True):
        assert own["perplexity"] == pytest.approx(base["perplexity"]) and own["kl"] == pytest.approx(0, abs=1e-6)
        assert own["agreement"] == 1 and other["kl"] > 0.1 and "kl" not in base
    assert same["last_word"] == teacher["last_word"] and [row["distance"] for row in same["last_word"]] == [0, 32]
    alone = run(kl=False)["long_context"]["far"]
    assert alone["last_word"] == far["last_word"]
    assert [set(row) & {"kl"} for row in alone["documents"]["positions"]] == [set()] * 3
    assert [row["perplexity"] for row in alone["documents"]["positions"]] == pytest.approx(
        [row["perplexity"] for row in far["documents"]["positions"]]
    )
