"""The chunked head is the dense computation, in less memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distillkit.distribution import DenseDistribution, SparseDistribution
from distillkit.losses import (
    DISTRIBUTION_LOSSES,
    LossTerm,
    chunked_vocabulary_losses,
    preference_pair_counts,
    reduce,
)
from distillkit.losses.functions import RANKING_LOSSES
from distillkit.models.chunked_logits import chunk_tokens_within
from tests.losses import golden

WIDTH, VOCAB = 6, 19
TERMS = [
    LossTerm("cross_entropy", DISTRIBUTION_LOSSES["cross_entropy"], 0.2),
    LossTerm("kl", DISTRIBUTION_LOSSES["kl"], 0.3, {"temperature": 2.0}),
    LossTerm("jsd", DISTRIBUTION_LOSSES["jsd"], 0.1, {"missing_probability_handling": "symmetric_uniform"}),
    LossTerm("hinge", DISTRIBUTION_LOSSES["hinge"], 0.4, {"top_k": 3}),
]


class Problem:
    """Hidden states made from token ids through an embedding, a head, a teacher, and labels of which some are -100."""

    def __init__(self, tokens, dtype=torch.float64, trainable=True, tied=False, bias=False):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=dtype)

        self.embedding = normal(VOCAB, WIDTH).requires_grad_()
        self.mixing = normal(WIDTH, WIDTH)
        self.weight = self.embedding if tied else normal(VOCAB, WIDTH).requires_grad_(trainable)
        self.bias = normal(VOCAB).requires_grad_(trainable) if bias else None
        self.ids = torch.randint(VOCAB, (tokens,), generator=generator)
        self.labels = torch.randint(VOCAB, (tokens,), generator=generator)
        self.labels[::4] = -100
        self.teacher_logits = normal(tokens, VOCAB)
        self.normalizers = {term.name: 7.0 + position for position, term in enumerate(TERMS)}

    def hidden_states(self):
        return F.embedding(self.ids, self.embedding) @ self.mixing

    def teacher(self, rows):
        return DenseDistribution(self.teacher_logits[rows])

    def dense(self):
        logits = F.linear(self.hidden_states(), self.weight, self.bias)
        loss, sums = 0.0, {}
        for term in TERMS:
            per_token, _ = term.function(logits, DenseDistribution(self.teacher_logits), self.labels, **term.options)
            sums[term.name] = per_token[self.labels != -100].sum()
            loss = loss + term.weight * sums[term.name] / self.normalizers[term.name]
        return loss, sums

    def chunked(self, chunk_tokens, **options):
        return chunked_vocabulary_losses(
            self.hidden_states(),
            self.weight,
            self.bias,
            self.labels,
            self.teacher,
            TERMS,
            self.normalizers,
            chunk_tokens,
            **options,
        )

    def gradients(self, loss):
        trained = [x for x in (self.embedding, self.weight, self.bias) if x is not None and x.requires_grad]
        return torch.autograd.grad(loss, trained)


HEADS = {
    "frozen": {"trainable": False},
    "trainable": {"trainable": True},
    "tied": {"tied": True},
    "trainable with bias": {"trainable": True, "bias": True},
    "frozen with bias": {"trainable": False, "bias": True},
}


@pytest.mark.parametrize("chunk_tokens", [1, 3, 8, 13, 14, 100])
@pytest.mark.parametrize("head", HEADS)
def test_equals_the_dense_computation(head, chunk_tokens):
    problem = Problem(13, **HEADS[head])
    loss, sums, _ = problem.chunked(chunk_tokens)
    dense_loss, dense_sums = problem.dense()
    torch.testing.assert_close(loss, dense_loss, rtol=1e-10, atol=1e-12)
    for name, value in dense_sums.items():
        torch.testing.assert_close(sums[name], value.detach(), rtol=1e-10, atol=1e-12)
    # A loss that is a part of another, as in gradient accumulation: the incoming gradient is not 1.
    expected = problem.gradients(0.37 * dense_loss)
    for gradient, dense_gradient in zip(problem.gradients(0.37 * loss), expected, strict=True):
        torch.testing.assert_close(gradient, dense_gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_any_number_of_tokens(tokens):
    problem = Problem(tokens, tied=True)
    loss, _sums, counts = problem.chunked(2)
    torch.testing.assert_close(loss, torch.as_tensor(problem.dense()[0], dtype=torch.float64))
    assert counts["kl"] == (problem.labels != -100).sum()
    for gradient in problem.gradients(loss):
        assert torch.all(gradient.isfinite())


def test_a_head_that_sees_no_token_still_gives_its_parameters_gradients_of_zero():
    weight = torch.randn(VOCAB, WIDTH, requires_grad=True)
    nothing = torch.zeros(0, WIDTH)
    labels = torch.zeros(0, dtype=torch.int64)
    loss, _, _ = chunked_vocabulary_losses(
        nothing, weight, None, labels, None, TERMS[:1], {"cross_entropy": 0}, chunk_tokens=4
    )
    loss.backward()
    assert loss == 0 and torch.all(weight.grad == 0)


@pytest.mark.parametrize("row", [row for row in golden.ROWS if row["teacher"] != "hidden_states"], ids=golden.row_id)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 10])
def test_golden_rows_at_any_chunk_size(row, chunk_tokens):
    """Through an identity head the logits are the hidden states."""
    hidden = golden.INPUTS["student_logits"].flatten(0, 1).requires_grad_()

    def teacher(rows):
        if row["teacher"] == "dense":
            return DenseDistribution(golden.INPUTS["teacher_logits"].flatten(0, 1)[rows])
        ids, logprobs = golden.INPUTS["sparse_ids"], golden.INPUTS["sparse_logprobs"]
        return SparseDistribution(ids.flatten(0, 1)[rows], logprobs.flatten(0, 1)[rows])

    counts = golden.MASK
    if row["function"] in RANKING_LOSSES:
        counts = preference_pair_counts(teacher(slice(None)))[golden.MASK]
    loss, _, _ = chunked_vocabulary_losses(
        hidden,
        torch.eye(97),
        None,
        torch.where(golden.MASK, 5, -100),
        teacher,
        [LossTerm("it", DISTRIBUTION_LOSSES[row["function"]], 1.0, golden.options(row))],
        {"it": counts.sum()},
        chunk_tokens,
    )
    loss.backward()
    assert loss.item() == pytest.approx(row["mean_over_unmasked"], rel=1e-4)
    assert hidden.grad.norm().item() == pytest.approx(row["grad_norm"], rel=1e-4)


class Sizes(TorchDispatchMode):
    """The number of elements of every tensor made, and whether a matmul made something of the head's shape."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.head_shaped = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                self.head_shaped += tensor.shape == (VOCAB, WIDTH) and "mm" in str(func)
        return result


def test_nothing_of_tokens_times_vocabulary_is_made():
    problem = Problem(600, dtype=torch.float32)
    saved = []
    with (
        Sizes() as sizes,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t),
    ):
        hidden = problem.hidden_states().detach().requires_grad_()
        loss, _, _ = chunked_vocabulary_losses(
            hidden, problem.weight, None, problem.labels, problem.teacher, TERMS, problem.normalizers, 16
        )
        loss.backward()
    assert sizes.largest <= 600 * WIDTH < 600 * VOCAB
    assert max(saved) <= 600 * WIDTH


@pytest.mark.parametrize("trainable", [False, True])
def test_a_frozen_head_costs_no_gradient(trainable):
    problem = Problem(40, trainable=trainable)
    with Sizes() as sizes:
        problem.chunked(8)
    assert bool(sizes.head_shaped) == trainable


def test_without_gradients_the_same_values_and_no_graph():
    problem = Problem(13)
    expected, expected_sums, _ = problem.chunked(4)
    with torch.no_grad(), Sizes() as sizes:
        loss, sums, _ = problem.chunked(4)
    assert not loss.requires_grad and torch.equal(loss, expected.detach())
    assert torch.equal(sums["kl"], expected_sums["kl"])
    assert sizes.head_shaped == 0


def test_autocast_multiplies_in_bfloat16_and_accumulates_in_float32():
    problem = Problem(64, dtype=torch.float32)
    dtypes = set()

    class Matmuls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
                dtypes.update(x.dtype for x in args[-2:])
            return func(*args, **(kwargs or {}))

    hidden = problem.hidden_states().detach().requires_grad_()
    arguments = (problem.weight, None, problem.labels, problem.teacher, TERMS, problem.normalizers)
    with torch.autocast("cpu", torch.bfloat16), Matmuls():
        loss, _, _ = chunked_vocabulary_losses(hidden, *arguments, 1)
    assert dtypes == {torch.bfloat16}
    assert loss.dtype == torch.float32
    gradients = torch.autograd.grad(loss, [hidden, problem.weight])
    assert [g.dtype for g in gradients] == [torch.float32, torch.float32]

    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(hidden, problem.weight)
    assert logits.dtype == torch.bfloat16
    expected_loss = sum(
        term.weight
        * term.function(logits, DenseDistribution(problem.teacher_logits), problem.labels, **term.options)[0][
            problem.labels != -100
        ].sum()
        / problem.normalizers[term.name]
        for term in TERMS
    )
    torch.testing.assert_close(loss, expected_loss)
    # 64 one-row products, added in float32, are as near to the exact gradient as one product is: a running sum in
    # bfloat16 would stop to grow.
    exact = torch.autograd.grad(expected_loss, logits)[0].double().T @ hidden.detach().double()
    assert (gradients[1].double() - exact).norm() < 5e-3 * exact.norm()


def test_bfloat16_models_get_bfloat16_gradients():
    problem = Problem(9, dtype=torch.bfloat16)
    loss, _, _ = problem.chunked(4)
    assert loss.dtype == torch.float32
    assert all(gradient.dtype == torch.bfloat16 for gradient in problem.gradients(loss))


@pytest.mark.parametrize("sparse", [False, True])
def test_columns_beyond_the_common_vocabulary_carry_no_probability(sparse):
    common = 15
    problem = Problem(13, bias=True)
    problem.labels %= common
    wider = torch.cat([problem.teacher_logits, 3 + torch.zeros(13, 4).double()], dim=-1)

    def teacher(rows):
        dense = DenseDistribution(wider[rows])
        return dense.top_k(23) if sparse else dense

    hidden = problem.hidden_states()
    loss, _, _ = chunked_vocabulary_losses(
        hidden, problem.weight, problem.bias, problem.labels, teacher, TERMS, problem.normalizers, 4, common
    )
    gradients = problem.gradients(loss)
    expected, _, _ = chunked_vocabulary_losses(
        problem.hidden_states(),
        problem.weight[:common],
        problem.bias[:common],
        problem.labels,
        lambda rows: DenseDistribution(wider[rows, :common]),
        TERMS,
        problem.normalizers,
        4,
    )
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    for gradient, other in zip(gradients, problem.gradients(expected), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-12)
    assert torch.all(gradients[1][common:] == 0)


def test_counts_of_ranking_losses_are_pairs():
    problem = Problem(13)
    _, sums, counts = problem.chunked(4)
    counted = problem.labels != -100
    per_token = DISTRIBUTION_LOSSES["hinge"](
        F.linear(problem.hidden_states(), problem.weight), problem.teacher(slice(None)), problem.labels, top_k=3
    )
    assert counts["hinge"] == 3 * counted.sum()
    torch.testing.assert_close(sums["hinge"] / counts["hinge"], reduce(*per_token, counted).detach())


def test_a_loss_that_needs_a_teacher_says_so():
    with pytest.raises(ValueError, match="needs a teacher"):
        chunked_vocabulary_losses(
            torch.zeros(2, 3), torch.zeros(4, 3), None, torch.zeros(2).long(), None, TERMS[:2], {}, 4
        )


def test_chunks_follow_the_memory_budget():
    assert chunk_tokens_within(2**30, 49152) == 606
    assert chunk_tokens_within(1, 49152) == 1


@pytest.mark.gpu
def test_padding_of_the_head_on_cuda_changes_nothing():
    problem = Problem(13, bias=True)
    expected_loss, _, _ = problem.chunked(4)
    expected = problem.gradients(expected_loss)
    for name in ("embedding", "mixing", "weight", "bias", "ids", "labels", "teacher_logits"):
        tensor = getattr(problem, name)
        setattr(problem, name, tensor.detach().cuda().requires_grad_(tensor.requires_grad))
    loss, _, _ = problem.chunked(4)
    torch.testing.assert_close(loss.cpu(), expected_loss, rtol=1e-9, atol=1e-12)
    for gradient, other in zip(problem.gradients(loss), expected, strict=True):
        torch.testing.assert_close(gradient.cpu(), other, rtol=1e-9, atol=1e-12)
