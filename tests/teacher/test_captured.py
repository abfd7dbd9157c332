"""What a captured teacher says of rows of a batch is what was stored of them, read only where it is asked for."""

import math

import pytest
import torch
from datasets import Dataset

from distillkit.compression import build_codec
from distillkit.config import DatasetSource, UserError
from distillkit.config.teacher import DatasetTeacherConfig
from distillkit.distribution import DenseDistribution
from distillkit.evaluation import measure_divergence
from distillkit.shards import write_background
from distillkit.teacher import SignalRequest
from distillkit.teacher.captured import CapturedTeacher
from distillkit.teacher.live import LiveTeacher
from distillkit.teacher.opening import open_background, open_captured
from tests.training.tiny import VOCAB, batch, llama, row

K = 6


@pytest.fixture(scope="module")
def teacher_model():
    return llama(0, layers=3)


@pytest.fixture(scope="module")
def codec():
    return build_codec("plain", {"k": K, "vocab_size": VOCAB})


@pytest.fixture(scope="module")
def stored(teacher_model, codec):
    """A batch with the teacher's distribution of each next token."""
    made = batch(row([7, 5], seed=1), row([9], seed=2))
    with torch.no_grad():
        logits = teacher_model(
            input_ids=made["input_ids"], position_ids=made["position_ids"], use_cache=False
        ).logits.flatten(0, 1)
    columns = codec.encode(DenseDistribution(logits).top_k(K))
    return {**made, **{name: values.unflatten(0, (2, 12)) for name, values in columns.items()}}


def test_it_says_what_the_live_teacher_says_of_its_likeliest_tokens(teacher_model, codec, stored):
    rows = torch.tensor([0, 3, 11, 20])
    live = LiveTeacher(teacher_model).signal(stored, SignalRequest(top_k=K)).distribution(rows)(slice(1, 4))
    said = CapturedTeacher(codec).signal(stored).distribution(rows)(slice(1, 4))
    assert torch.equal(said.ids, live.ids)
    torch.testing.assert_close(said.logprobs, live.logprobs)
    assert said.background is None
    background = torch.randn(VOCAB).log_softmax(-1)
    assert CapturedTeacher(codec, background).signal(stored).distribution(rows)(slice(0, 1)).background is background


def test_only_the_chunk_that_is_asked_for_is_decoded(codec, stored):
    decoded = []

    class Counting:
        columns = codec.columns
        vocabulary_size = codec.vocabulary_size

        def decode(self, columns):
            decoded.append(len(columns["token_ids"]))
            return codec.decode(columns)

    said = CapturedTeacher(Counting()).signal(stored).distribution(torch.arange(10))
    assert decoded == []
    said(slice(0, 4)), said(slice(4, 10))
    assert decoded == [4, 6]


def test_the_divergence_from_it_is_over_what_was_stored_and_the_rest(teacher_model, codec, stored):
    student = llama(1)
    with torch.no_grad():
        p, q = (
            model(input_ids=stored["input_ids"], position_ids=stored["position_ids"], use_cache=False)
            .logits.double()
            .log_softmax(-1)
            for model in (teacher_model, student)
        )
    kl = agreement = nll = 0.0
    tokens = 0
    for index, position in (stored["targets"] != -100).nonzero().tolist():
        top = p[index, position].topk(K)
        theirs, ours = top.values.exp(), q[index, position][top.indices].exp()
        kl += float((theirs * (theirs / ours).log()).sum())
        kl += (1 - float(theirs.sum())) * math.log((1 - float(theirs.sum())) / (1 - float(ours.sum())))
        agreement += float(top.indices[0] == q[index, position].argmax())
        nll -= float(q[index, position, stored["targets"][index, position]])
        tokens += 1
    measured = measure_divergence(CapturedTeacher(codec), student, [stored], num_tokens=100, chunk_tokens=5)
    assert measured.tokens == tokens
    assert measured.kl == pytest.approx(kl / tokens, rel=1e-4)
    assert measured.agreement == agreement / tokens
    assert measured.student_perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert measured.teacher_perplexity is None
    assert "teacher_perplexity" not in measured.as_metrics()
    whole = measure_divergence(LiveTeacher(teacher_model), student, [stored], num_tokens=100)
    assert measured.kl < whole.kl
    alone = measure_divergence(None, student, [stored], num_tokens=100)
    assert alone.student_perplexity == pytest.approx(whole.student_perplexity)
    assert set(alone.as_metrics()) == {"student_perplexity", "tokens"}


def test_a_background_is_read_from_its_file_or_its_dataset(tmp_path):
    logprobs = torch.randn(VOCAB).log_softmax(-1)
    name = write_background(tmp_path, logprobs)
    torch.testing.assert_close(open_background(str(tmp_path / name), VOCAB), logprobs)
    with pytest.raises(UserError, match=r"^teacher\.background: .* has no background; name a dataset that distillkit"):
        open_background(str(tmp_path), VOCAB)  # a folder without a manifest
    with pytest.raises(UserError, match=r"^teacher\.background: covers 97 tokens, but the teacher's vocabulary has 98"):
        open_background(str(tmp_path / name), VOCAB + 1)


def test_plain_columns_need_the_size_of_the_vocabulary(tmp_path):
    rows = {"input_ids": [[1, 2]], "token_ids": [[[4, 5], [6, 7]]], "top_values": [[[-0.1, -3.0], [-0.5, -1.0]]]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "rows")
    source = DatasetSource(disk_path=str(tmp_path / "rows"))
    with pytest.raises(UserError, match=r"^teacher\.vocab_size: is missing"):
        open_captured(DatasetTeacherConfig(), source)
    opened = open_captured(DatasetTeacherConfig(vocab_size=9), source)
    assert (opened.codec.k, opened.vocabulary_size, opened.columns) == (2, 9, ("token_ids", "top_values"))


@pytest.mark.parametrize(("column", "value"), [("token_ids", VOCAB), ("token_ids", -1), ("top_values", float("nan"))])
def test_a_strange_row_is_told_before_the_run_or_when_it_is_read(codec, stored, column, value):
    """It is no index error, and no NaN in the weights."""
    teacher = CapturedTeacher(codec)
    damaged = {**stored, column: stored[column].clone()}
    damaged[column][1, 3, 2] = value
    read = teacher.signal(damaged).distribution(torch.arange(24))(slice(0, 24))
    assert read.ids.min() >= 0 and read.ids.max() < VOCAB
    with pytest.raises(UserError, match=r"a row that was read holds a token outside the vocabulary"):
        teacher.signal(stored)
    columns = {name: damaged[name].tolist() for name in ("input_ids", *codec.columns)}
    rows = Dataset.from_dict({**columns, "labels": columns["input_ids"], "seq_lengths": [[12], [12]]})
    with pytest.raises(UserError, match="rows: decoded as plain, row 1 holds "):
        CapturedTeacher(codec).check_rows(rows, "rows")
    CapturedTeacher(codec).check_rows(rows.select([0]), "rows")
