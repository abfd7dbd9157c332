"""What holds for any logits, teachers, masks and chunks: further to the properties in test_divergences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distillkit.distribution import DenseDistribution, SparseDistribution
from distillkit.losses import DISTRIBUTION_LOSSES, LossTerm, chunked_vocabulary_losses, reduce
from tests.losses.test_divergences import DIVERGENCES, VOCAB, labels_for, logits_rows, paired, sparse_case, value

ALL = sorted(DISTRIBUTION_LOSSES)
HANDLINGS = ["zero", "symmetric_uniform", "background"]
masks = st.lists(st.booleans(), min_size=3, max_size=3)


def sparse_teacher(logits, k, background=None):
    named = DenseDistribution(logits).top_k(k)
    return SparseDistribution(named.ids, named.logprobs, None if background is None else background.log_softmax(-1))


@given(paired(logits_rows), st.sampled_from(["kl", "reverse_kl", "jsd"]), st.sampled_from(HANDLINGS), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_divergences_from_a_sparse_teacher_are_bounded(pair, name, handling, k):
    student, logits = pair
    divergence = value(name, student, sparse_teacher(logits, k, logits[0]), missing_probability_handling=handling)
    assert torch.all(divergence >= -1e-9)
    assert torch.all(divergence <= (math.log(2) + 1e-9 if name == "jsd" else math.inf))


@given(logits_rows, st.sampled_from(DIVERGENCES), st.sampled_from(HANDLINGS[1:]), st.integers(1, VOCAB))
@settings(max_examples=100, deadline=None)
def test_a_student_that_agrees_with_a_sparse_teacher_pays_nothing(logits, name, handling, k):
    """The teacher's own logits; one row, because a background is one for all rows."""
    teacher = sparse_teacher(logits[:1], k, logits[0])
    divergence = value(name, logits[:1], teacher, missing_probability_handling=handling)
    torch.testing.assert_close(divergence, torch.zeros_like(divergence), rtol=0, atol=1e-9)


@given(paired(logits_rows), st.sampled_from(ALL), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_a_sparse_teacher_that_names_every_token_in_any_order_is_the_dense_teacher(pair, name, random):
    student, logits = pair
    # Where the student says what the teacher says, rounding decides the slope of tvd and hinge: it never quite does.
    student = student + 0.1 * torch.arange(1, VOCAB + 1, dtype=torch.float64).sqrt()
    order = list(range(VOCAB))
    random.shuffle(order)
    named = sparse_teacher(logits, VOCAB)
    shuffled = SparseDistribution(named.ids[:, order], named.logprobs[:, order])
    results = []
    for teacher in (DenseDistribution(logits), shuffled):
        inputs = student.clone().requires_grad_()
        sums, counts = DISTRIBUTION_LOSSES[name](inputs, teacher, labels_for(student))
        results.append((sums.detach(), counts, *torch.autograd.grad(sums.sum(), inputs)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@given(paired(logits_rows), st.sampled_from(ALL), st.booleans(), masks)
@settings(max_examples=100, deadline=None)
def test_masked_positions_have_zero_gradient(pair, name, sparse, counted):
    student, logits = pair
    inputs, mask = student.clone().requires_grad_(), torch.tensor(counted)[: len(student)]
    teacher = sparse_teacher(logits, 3) if sparse else DenseDistribution(logits)
    loss = reduce(*DISTRIBUTION_LOSSES[name](inputs, teacher, labels_for(student)), mask)
    (gradient,) = torch.autograd.grad(loss, inputs)
    assert torch.all(gradient[~mask] == 0) and torch.all(gradient.isfinite())


def through_the_head(hidden, logits, name, sparse, labels, chunk_tokens):
    """An identity head: the logits are the hidden states."""
    return chunked_vocabulary_losses(
        hidden,
        torch.eye(VOCAB, dtype=torch.float64),
        None,
        labels,
        lambda rows: sparse_teacher(logits[rows], 3) if sparse else DenseDistribution(logits[rows]),
        [LossTerm("it", DISTRIBUTION_LOSSES[name], 1.0)],
        {"it": 2.0},
        chunk_tokens,
    )


@given(paired(logits_rows), st.sampled_from(ALL), st.booleans(), masks, st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_chunks_change_nothing_and_masked_positions_have_zero_gradient(pair, name, sparse, counted, chunk_tokens):
    student, logits = pair
    mask = torch.tensor(counted)[: len(student)]
    labels = torch.where(mask, 5, -100)
    hidden, inputs = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss, sums, counts = through_the_head(hidden, logits, name, sparse, labels, chunk_tokens)
    teacher = sparse_teacher(logits, 3) if sparse else DenseDistribution(logits)
    expected = DISTRIBUTION_LOSSES[name](inputs, teacher, labels)
    torch.testing.assert_close(sums["it"], expected[0][mask].sum().detach(), rtol=1e-9, atol=1e-12)
    assert counts["it"] == expected[1][mask].sum()
    (gradient,) = torch.autograd.grad(loss, hidden)
    (slow_gradient,) = torch.autograd.grad(expected[0][mask].sum() / 2, inputs)
    torch.testing.assert_close(gradient, slow_gradient, rtol=1e-9, atol=1e-12)
    assert torch.all(gradient[~mask] == 0)


@given(paired(logits_rows), st.sampled_from(ALL), st.booleans(), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_doubled_rows_double_what_the_head_sums_and_counts(pair, name, sparse, chunk_tokens):
    student, logits = pair
    labels = torch.full((len(student),), 5)
    _, once, one_count = through_the_head(student, logits, name, sparse, labels, chunk_tokens)
    _, twice, two_counts = through_the_head(
        student.repeat(2, 1), logits.repeat(2, 1), name, sparse, labels.repeat(2), chunk_tokens
    )
    torch.testing.assert_close(twice["it"], 2 * once["it"], rtol=1e-9, atol=1e-12)
    assert two_counts["it"] == 2 * one_count["it"]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradcheck_with_a_background(name, temperature):
    student, _, sparse = sparse_case()
    options = {"temperature": temperature, "missing_probability_handling": "background"}
    assert torch.autograd.gradcheck(lambda logits: value(name, logits, sparse, **options), student.requires_grad_())
