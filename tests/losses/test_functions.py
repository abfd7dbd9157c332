"""The published values, and what holds for all losses alike."""

import pytest
import torch

from distillkit.config.losses import LOSS_NAMES
from distillkit.distribution import DenseDistribution, SparseDistribution
from distillkit.losses import ATTENTION_LOSSES, DISTRIBUTION_LOSSES, HIDDEN_STATE_LOSSES, reduce
from tests.losses import golden

DIVERGENCES = ["kl", "reverse_kl", "jsd", "tvd"]
RANKING = ["hinge", "logistic_ranking"]
DISTRIBUTION_ROWS = [row for row in golden.ROWS if row["function"] in DISTRIBUTION_LOSSES]
HIDDEN_ROWS = [row for row in golden.ROWS if row["function"] in HIDDEN_STATE_LOSSES]


def make_teacher(kind, tokens=6, vocab=11, k=4, seed=0, dtype=torch.float64):
    logits = 2 * torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    dense = DenseDistribution(logits)
    return {"dense": dense, "sparse": dense.top_k(k), "all": dense.top_k(vocab)}[kind]


def make_logits(tokens=6, vocab=11, seed=1):
    return torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("row", DISTRIBUTION_ROWS, ids=golden.row_id)
def test_distribution_losses_have_the_published_values_and_gradients(row):
    logits = golden.INPUTS["student_logits"].flatten(0, 1).requires_grad_()
    if row["teacher"] == "dense":
        teacher = DenseDistribution(golden.INPUTS["teacher_logits"].flatten(0, 1))
    else:
        ids, logprobs = golden.INPUTS["sparse_ids"], golden.INPUTS["sparse_logprobs"]
        teacher = SparseDistribution(ids.flatten(0, 1), logprobs.flatten(0, 1))
    labels = torch.zeros(len(logits), dtype=torch.int64)
    loss = reduce(*DISTRIBUTION_LOSSES[row["function"]](logits, teacher, labels, **golden.options(row)), golden.MASK)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(row["mean_over_unmasked"], rel=1e-4)
    assert gradient.norm().item() == pytest.approx(row["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("row", HIDDEN_ROWS, ids=golden.row_id)
def test_hidden_state_losses_have_the_published_values(row):
    student, teacher = golden.INPUTS["student_hidden"].flatten(1, 2), golden.INPUTS["teacher_hidden"].flatten(1, 2)
    loss = HIDDEN_STATE_LOSSES[row["function"]]
    values = [reduce(*loss(student[i], teacher[j]), golden.MASK) for i, j in row["layer_mapping"]]
    assert torch.stack(values).mean().item() == pytest.approx(row["mean_over_unmasked"], rel=1e-4)


def test_every_loss_that_a_config_can_name_exists():
    assert set(LOSS_NAMES) == {*DISTRIBUTION_LOSSES, *HIDDEN_STATE_LOSSES, *ATTENTION_LOSSES}


CASES = [("cross_entropy", {})]
CASES += [(name, {"temperature": t}) for name in DIVERGENCES for t in (1.0, 2.0)]
CASES += [(name, {"missing_probability_handling": "symmetric_uniform"}) for name in DIVERGENCES]
CASES += [("hinge", {}), ("hinge", {"margin": 0.1}), ("logistic_ranking", {})]


@pytest.mark.parametrize("kind", ["dense", "sparse", "all"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_gradcheck(name, options, kind):
    teacher, labels = make_teacher(kind, tokens=3), torch.tensor([1, 5, -100])
    logits = make_logits(tokens=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: DISTRIBUTION_LOSSES[name](x, teacher, labels, **options)[0], logits)


@pytest.mark.parametrize("name", HIDDEN_STATE_LOSSES)
def test_hidden_state_gradcheck(name):
    student, teacher = make_logits(seed=2).requires_grad_(), make_logits(seed=3)
    assert torch.autograd.gradcheck(lambda x: HIDDEN_STATE_LOSSES[name](x, teacher)[0], student)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_sparse_teacher_that_names_every_token_is_the_dense_teacher(name, options):
    labels = torch.arange(6)
    results = []
    for kind in ("dense", "all"):
        logits = make_logits().requires_grad_()
        sums, counts = DISTRIBUTION_LOSSES[name](logits, make_teacher(kind), labels, **options)
        (gradient,) = torch.autograd.grad(sums.sum(), logits)
        results.append((sums.detach(), counts, gradient))
    for dense, sparse in zip(*results, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("name", DISTRIBUTION_LOSSES)
def test_masked_tokens_have_no_gradient_and_change_nothing(name, kind):
    teacher, labels = make_teacher(kind), torch.arange(6)
    mask = torch.tensor([True, False, True, True, False, False])
    logits = make_logits().requires_grad_()
    loss = reduce(*DISTRIBUTION_LOSSES[name](logits, teacher, labels), mask)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.all(gradient[~mask] == 0)
    changed = torch.where(mask[:, None], logits.detach(), 7 * torch.randn_like(logits))
    assert reduce(*DISTRIBUTION_LOSSES[name](changed, teacher, labels), mask) == loss


def test_a_step_in_which_nothing_counts_is_zero():
    logits = make_logits().requires_grad_()
    result = DISTRIBUTION_LOSSES["kl"](logits, make_teacher("dense"), torch.arange(6))
    loss = reduce(*result, torch.zeros(6, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and torch.all(logits.grad == 0)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("name", DISTRIBUTION_LOSSES)
def test_low_precision_logits_are_judged_in_float32(name, kind):
    teacher, labels = make_teacher(kind, dtype=torch.float32), torch.arange(6)
    logits = make_logits().bfloat16()
    sums, _ = DISTRIBUTION_LOSSES[name](logits, teacher, labels)
    expected, _ = DISTRIBUTION_LOSSES[name](logits.double(), teacher, labels)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-6)
