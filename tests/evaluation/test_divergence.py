"""The divergence is what a dense computation in float64 gives."""

import math

import pytest
import torch

from distillkit.config import UserError
from distillkit.evaluation.divergence import measure_divergence
from distillkit.teacher.live import LiveTeacher
from tests.evaluation.largest_tensor import LargestTensor
from tests.training.tiny import VOCAB, batch, llama, row


@pytest.fixture(scope="module")
def models():
    return llama(0, dtype=torch.float64), llama(1, layers=3, tied=False, dtype=torch.float64)


def dense(teacher, student, documents):
    """KL, agreement and perplexities from the full logits of each document alone."""
    kl = agreement = teacher_nll = student_nll = 0.0
    tokens = 0
    for document in documents:
        ids = torch.tensor([document])
        p, q = (model(ids).logits[0, :-1].log_softmax(-1) for model in (teacher, student))
        kl += (p.exp() * (p - q)).sum().item()
        agreement += (p.argmax(-1) == q.argmax(-1)).sum().item()
        targets = ids[0, 1:, None]
        teacher_nll -= p.gather(-1, targets).sum().item()
        student_nll -= q.gather(-1, targets).sum().item()
        tokens += len(targets)
    return kl / tokens, agreement / tokens, math.exp(teacher_nll / tokens), math.exp(student_nll / tokens), tokens


def measure(teacher, student, batches, **options):
    return measure_divergence(LiveTeacher(teacher), student, batches, **options)


def documents_of(*rows):
    for each in rows:
        start = 0
        for length in each["seq_lengths"]:
            yield each["input_ids"][start : start + length]
            start += length


@torch.no_grad()
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000, None])
def test_it_equals_the_dense_computation_on_documents_alone(models, chunk_tokens):
    rows = [row([9, 4, 11], seed=1), row([24], seed=2), row([1, 5], seed=3)]
    batches = [batch(rows[0], rows[1]), batch(rows[2], sequence_length=24)]
    measured = measure(*models, batches, num_tokens=10**6, chunk_tokens=chunk_tokens)
    expected = dense(*models, documents_of(*rows))
    assert tuple(measured.as_metrics().values()) == pytest.approx(expected, rel=1e-12)


def test_it_measures_exactly_as_many_tokens_as_asked_for(models):
    batches = [batch(row([20], seed=4)), batch(row([20], seed=5))]
    first = measure(*models, batches, num_tokens=25)
    assert first.tokens == 25
    assert first.kl != measure(*models, batches, num_tokens=24).kl


def test_a_model_does_not_diverge_from_itself(models):
    teacher, _ = models
    measured = measure(teacher, teacher, [batch(row([30]))], num_tokens=100)
    assert measured.kl == 0.0
    assert measured.agreement == 1.0
    assert measured.student_perplexity == measured.teacher_perplexity


def test_tokens_that_do_not_count_do_not_count(models):
    whole, masked = row([12], seed=6), row([12], seed=6, ignored=4)
    measured = measure(*models, [batch(masked)], num_tokens=100)
    assert measured.tokens == 7
    assert measured.kl != measure(*models, [batch(whole)], num_tokens=100).kl


def test_columns_beyond_the_common_vocabulary_are_as_if_they_were_not_there(models):
    teacher, student = models
    wide = llama(1, layers=3, tied=False, dtype=torch.float64)
    wide.load_state_dict(student.state_dict())
    wide.resize_token_embeddings(128, mean_resizing=False)
    expected = measure(teacher, student, [batch(row([30]))], num_tokens=100)
    measured = measure(teacher, wide, [batch(row([30]))], num_tokens=100, vocabulary_size=VOCAB)
    assert measured == expected


def test_an_empty_text_is_refused(models):
    with pytest.raises(UserError, match="no token"):
        measure(*models, [batch(row([1]))], num_tokens=100)


def test_no_tensor_of_tokens_times_vocabulary_is_made():
    teacher, student = llama(0, attn_implementation="sdpa"), llama(1)
    teacher.resize_token_embeddings(4096, mean_resizing=False)
    student.resize_token_embeddings(4096, mean_resizing=False)
    with LargestTensor() as largest:
        measure(teacher, student, [batch(row([256]))], num_tokens=1000, chunk_tokens=8)
    assert largest.elements <= 4096 * 32  # the head itself; the logits would be eight times as many
