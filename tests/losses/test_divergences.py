"""Divergences against loops, and the inequalities that make them divergences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distillkit.distribution import DenseDistribution, SparseDistribution
from distillkit.losses import DISTRIBUTION_LOSSES, reduce
from tests.losses import reference

VOCAB = 7
DIVERGENCES = ["kl", "reverse_kl", "jsd", "tvd"]
HANDLINGS = ["dense", "zero", "symmetric_uniform", "background"]
finite = st.floats(-8, 8, allow_nan=False, width=32)
logits_rows = st.lists(st.lists(finite, min_size=VOCAB, max_size=VOCAB), min_size=1, max_size=3).map(
    lambda rows: torch.tensor(rows, dtype=torch.float64)
)


def paired(draw_from):
    """Two tensors of logits of the same shape."""
    return draw_from.flatmap(
        lambda first: st.lists(finite, min_size=first.numel(), max_size=first.numel()).map(
            lambda flat: (first, torch.tensor(flat, dtype=torch.float64).reshape(first.shape))
        )
    )


def labels_for(logits):
    return torch.zeros(len(logits), dtype=torch.int64)


def value(name, student, teacher, **options):
    return DISTRIBUTION_LOSSES[name](student, teacher, labels_for(student), **options)[0]


def sparse_case(k=3, tokens=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(tokens, VOCAB, generator=generator, dtype=torch.float64)
    logprobs = (2 * torch.randn(tokens, VOCAB, generator=generator, dtype=torch.float64)).log_softmax(-1)
    background = torch.randn(VOCAB, generator=generator, dtype=torch.float64).log_softmax(-1)
    dense = DenseDistribution(logprobs)
    sparse = dense.top_k(k)
    return student, dense, SparseDistribution(sparse.ids, sparse.logprobs, background)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("handling", HANDLINGS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradient_equal_the_loops(name, handling, temperature):
    student, dense, sparse = sparse_case()
    fast_input, slow_input = student.clone().requires_grad_(), student.clone().requires_grad_()
    if handling == "dense":
        fast = value(name, fast_input, dense, temperature=temperature)
    else:
        fast = value(name, fast_input, sparse, temperature=temperature, missing_probability_handling=handling)
    slow = []
    for row in range(len(student)):
        if handling == "dense":
            named = dict(enumerate(dense.logits[row].exp().tolist()))
        else:
            named = dict(zip(sparse.ids[row].tolist(), sparse.logprobs[row].exp().tolist(), strict=True))
        background = sparse.background.exp().tolist()
        events = reference.student_and_teacher_events(slow_input[row], named, temperature, handling, background)
        slow.append(getattr(reference, name)(events))
    torch.testing.assert_close(fast, torch.stack(slow), rtol=1e-10, atol=1e-12)
    (fast_gradient,) = torch.autograd.grad(fast.sum(), fast_input)
    (slow_gradient,) = torch.autograd.grad(torch.stack(slow).sum(), slow_input)
    torch.testing.assert_close(fast_gradient, slow_gradient, rtol=1e-9, atol=1e-12)


@given(paired(logits_rows), st.sampled_from(["kl", "reverse_kl"]))
@settings(max_examples=60, deadline=None)
def test_kl_is_not_negative_and_zero_only_for_equals(pair, name):
    student, teacher = pair
    assert torch.all(value(name, student, DenseDistribution(teacher)) >= -1e-12)
    torch.testing.assert_close(value(name, teacher, DenseDistribution(teacher)), torch.zeros(len(teacher)).double())
    apart = (student.softmax(-1) - teacher.softmax(-1)).abs().amax(-1) > 1e-3
    assert torch.all(value(name, student, DenseDistribution(teacher))[apart] > 1e-9)


@given(paired(logits_rows))
@settings(max_examples=60, deadline=None)
def test_jsd_is_symmetric_and_at_most_ln_2(pair):
    student, teacher = pair
    there, back = value("jsd", student, DenseDistribution(teacher)), value("jsd", teacher, DenseDistribution(student))
    torch.testing.assert_close(there, back, rtol=1e-9, atol=1e-12)
    assert torch.all(there >= -1e-12) and torch.all(there <= math.log(2) + 1e-12)


@given(paired(logits_rows), st.sampled_from(["zero", "symmetric_uniform"]), st.integers(1, VOCAB))
@settings(max_examples=60, deadline=None)
def test_tvd_lies_between_0_and_1(pair, handling, k):
    student, teacher = pair
    for said in (DenseDistribution(teacher), DenseDistribution(teacher).top_k(k)):
        distance = value("tvd", student, said, missing_probability_handling=handling)
        assert torch.all(distance >= 0) and torch.all(distance <= 1 + 1e-12)


@given(paired(logits_rows), st.sampled_from(sorted(DISTRIBUTION_LOSSES)), st.floats(-50, 50), st.booleans())
@settings(max_examples=100, deadline=None)
def test_shifting_all_logits_changes_nothing(pair, name, offset, sparse):
    student, logits = pair
    teacher = DenseDistribution(logits).top_k(3) if sparse else DenseDistribution(logits)
    # Ranking counts strict preferences: a shift that rounds two logits together would be another teacher.
    moved = teacher if sparse or name in ("hinge", "logistic_ranking") else DenseDistribution(logits + offset)
    torch.testing.assert_close(
        value(name, student + offset, moved), value(name, student, teacher), rtol=1e-7, atol=1e-9
    )


@given(paired(logits_rows), st.sampled_from(sorted(DISTRIBUTION_LOSSES)), st.booleans())
@settings(max_examples=100, deadline=None)
def test_doubled_rows_double_the_sum_and_not_the_mean(pair, name, sparse):
    student, logits = pair
    teacher = DenseDistribution(logits).top_k(3) if sparse else DenseDistribution(logits)
    twice = DenseDistribution(logits.repeat(2, 1))
    twice = twice.top_k(3) if sparse else twice
    loss = DISTRIBUTION_LOSSES[name]
    once, doubled = (
        loss(student, teacher, labels_for(student)),
        loss(student.repeat(2, 1), twice, labels_for(student).repeat(2)),
    )
    torch.testing.assert_close(doubled[0].sum(), 2 * once[0].sum())
    mask = torch.ones(len(student), dtype=torch.bool)
    torch.testing.assert_close(reduce(*doubled, mask.repeat(2)), reduce(*once, mask))


@pytest.mark.parametrize("handling", ["zero", "symmetric_uniform", "background"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_an_absent_entry_is_as_if_it_were_not_in_the_list(name, handling):
    student, _, sparse = sparse_case()
    # Absent entries carry any id, here one that is present too.
    padded = SparseDistribution(
        torch.cat([sparse.ids, sparse.ids[:, :1]], dim=-1),
        torch.cat([sparse.logprobs, torch.full_like(sparse.logprobs[:, :1], -torch.inf)], dim=-1),
        sparse.background,
    )
    results = []
    for teacher in (sparse, padded):
        logits = student.clone().requires_grad_()
        loss = value(name, logits, teacher, missing_probability_handling=handling)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), logits)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("handling", ["zero", "symmetric_uniform", "background"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_row_without_a_word_has_finite_gradients(name, handling):
    student, _, sparse = sparse_case()
    silent = SparseDistribution(sparse.ids, torch.full_like(sparse.logprobs, -torch.inf), sparse.background)
    logits = student.clone().requires_grad_()
    loss = value(name, logits, silent, missing_probability_handling=handling)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.all(loss.isfinite()) and torch.all(gradient.isfinite())
    if handling == "zero":
        assert torch.all(gradient.abs() < 1e-12)


@pytest.mark.parametrize("handling", ["dense", "zero", "symmetric_uniform"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_student_certain_of_another_token_stays_finite(name, handling):
    logits = torch.zeros(1, VOCAB)
    logits[0, 2] = 200.0
    logits.requires_grad_()
    dense = DenseDistribution(torch.tensor([[9.0, 8.0, -300.0, 7.0, -torch.inf, 0.0, 0.0]]))
    options = {} if handling == "dense" else {"missing_probability_handling": handling}
    loss = value(name, logits, dense if handling == "dense" else dense.top_k(3), **options)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.all(loss.isfinite()) and torch.all(gradient.isfinite())


def test_vocabularies_of_different_width_are_refused():
    with pytest.raises(ValueError, match="9 columns, the student's 7"):
        value("kl", torch.zeros(2, 7), DenseDistribution(torch.zeros(2, 9)))


def test_a_background_that_is_not_there_is_refused():
    teacher = DenseDistribution(torch.zeros(2, 7)).top_k(2)
    with pytest.raises(ValueError, match="background needs"):
        value("kl", torch.zeros(2, 7), teacher, missing_probability_handling="background")
    with pytest.raises(ValueError, match="'uniform' is not known"):
        value("kl", torch.zeros(2, 7), teacher, missing_probability_handling="uniform")
