"""Ranking losses against loops over pairs."""

import pytest
import torch

from distillkit.distribution import DenseDistribution, SparseDistribution
from distillkit.losses import DISTRIBUTION_LOSSES, preference_pair_counts
from tests.losses import reference

CASES = [("hinge", {}), ("hinge", {"margin": 0.0}), ("hinge", {"margin": 0.1}), ("logistic_ranking", {})]


def student_and_teacher(tokens=4, vocab=9):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(tokens, vocab, generator=generator, dtype=torch.float64)
    return student, DenseDistribution(torch.randn(tokens, vocab, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["sparse", "sparse top_k", "dense", "dense top_k", "ties and absent entries"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_sums_counts_and_gradients_equal_the_loops(name, options, kind):
    student, teacher = student_and_teacher()
    ranked = teacher.top_k(4 if kind != "dense" else 9)
    if kind == "ties and absent entries":
        logprobs = ranked.logprobs.clone()
        logprobs[0, 1] = logprobs[0, 2]
        logprobs[1:, 3] = -torch.inf
        ranked = SparseDistribution(ranked.ids, logprobs)
    given = {"dense": teacher, "dense top_k": teacher, "sparse top_k": teacher.top_k(6)}.get(kind, ranked)
    extra = {"top_k": 4} if "top_k" in kind else {}
    logits = student.clone().requires_grad_()
    sums, counts = DISTRIBUTION_LOSSES[name](logits, given, None, **options, **extra)

    slow_logits = student.clone().requires_grad_()
    expected = []
    for row in range(len(student)):
        listed = zip(ranked.ids[row].tolist(), ranked.logprobs[row].exp().tolist(), strict=True)
        named = {token: p for token, p in listed if p > 0}
        expected.append(getattr(reference, name)(slow_logits[row], named, **options))
        assert counts[row] == len(reference.preference_pairs(named))
    torch.testing.assert_close(sums, torch.stack(expected), rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(sums.sum(), logits)
    (slow_gradient,) = torch.autograd.grad(torch.stack(expected).sum(), slow_logits)
    torch.testing.assert_close(gradient, slow_gradient, rtol=1e-9, atol=1e-12)
    assert torch.equal(counts, preference_pair_counts(given, **extra))


def test_a_student_that_has_the_teachers_gaps_pays_nothing():
    _, teacher = student_and_teacher()
    sums, _ = DISTRIBUTION_LOSSES["hinge"](teacher.logits, teacher.top_k(5), None)
    torch.testing.assert_close(sums, torch.zeros(4).double(), rtol=0, atol=1e-12)


def test_a_teacher_without_preferences_counts_no_pair():
    indifferent = DenseDistribution(torch.zeros(3, 8))
    sums, counts = DISTRIBUTION_LOSSES["logistic_ranking"](torch.randn(3, 8), indifferent, None)
    assert torch.all(sums == 0) and torch.all(counts == 0)
