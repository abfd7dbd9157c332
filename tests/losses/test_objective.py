"""The objective of a run: masks, shares, normalisation, hidden states."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from distillkit.config import LossConfig, UserError
from distillkit.distribution import DenseDistribution
from distillkit.losses import (
    DISTRIBUTION_LOSSES,
    HIDDEN_STATE_LOSSES,
    ModelShape,
    Objective,
    counted_rows,
    reduce,
    shifted_labels,
)
from distillkit.models.hidden_states import HiddenStateTaps

VOCAB = 23
FLAGSHIP = [
    LossConfig(function="cross_entropy", weight=0.2),
    LossConfig(function="kl", weight=0.2, temperature=2.0),
    LossConfig(function="hs_cosine", weight=0.6),
]
EVERYTHING = [LossConfig(function=name, weight=1 + 0.1 * i) for i, name in enumerate(DISTRIBUTION_LOSSES)]
EVERYTHING += [LossConfig(function=name, weight=0.7) for name in HIDDEN_STATE_LOSSES]


def llama(hidden_size=16, layers=3, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=hidden_size,
            intermediate_size=20,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            pad_token_id=None,
        )
    ).double()


def batch(rows=4, tokens=6):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB, (rows, tokens), generator=generator)
    labels = ids.clone()
    labels[:, 0] = -100
    labels[0, 3:] = -100
    labels[2, 2] = -100
    return ids, shifted_labels(labels)


def shape(model):
    return ModelShape(model.config.hidden_size, model.config.num_hidden_layers)


def run(objective, student, teacher, ids, targets, normalizer, preference_pairs=None):
    """One pass of student and teacher, in eager words of what a trainer does."""
    final_norm = objective.taps_final_norm
    with (
        torch.no_grad(),
        HiddenStateTaps(teacher.model, objective.teacher_layers, final_norm=final_norm) as teacher_taps,
    ):
        teacher_logits = teacher(ids).logits.flatten(0, 1)

    def distribution(rows):
        return lambda chunk: DenseDistribution(teacher_logits[rows[chunk]])

    with HiddenStateTaps(student.model, objective.student_layers, final_norm=final_norm) as taps:
        hidden = student.model(ids).last_hidden_state
    if preference_pairs is None and objective.ranking_terms:
        preference_pairs = objective.preference_pairs(targets, distribution)
    return objective(
        hidden,
        student.lm_head.weight,
        None,
        targets,
        distribution,
        taps.states,
        teacher_taps.states,
        normalizer,
        preference_pairs,
    )


def test_labels_are_shifted_and_the_last_position_predicts_nothing():
    targets = shifted_labels(torch.tensor([[-100, 4, 5, -100, 7]]))
    assert targets.tolist() == [[4, 5, -100, 7, -100]]
    assert counted_rows(targets).tolist() == [0, 1, 3]


def test_equals_the_weighted_mean_written_out():
    student, teacher = llama(seed=0), llama(seed=1)
    ids, targets = batch()
    objective = Objective(FLAGSHIP, "all", shape(student), shape(teacher), chunk_tokens=3)
    tokens = len(counted_rows(targets))
    result = run(objective, student, teacher, ids, targets, tokens)

    mask = targets[:, :-1].flatten() != -100
    outputs, teacher_outputs = (model(ids, output_hidden_states=True) for model in (student, teacher))
    logits, teacher_logits = (x.logits[:, :-1].flatten(0, 1) for x in (outputs, teacher_outputs))
    cross_entropy = F.cross_entropy(logits[mask], targets[:, :-1].flatten()[mask])
    said = DenseDistribution(teacher_logits.detach())
    kl = reduce(*DISTRIBUTION_LOSSES["kl"](logits, said, None, temperature=2.0), mask)
    with HiddenStateTaps(student.model, [1, 2, 3], final_norm=False) as taps:
        student(ids)
    with HiddenStateTaps(teacher.model, [1, 2, 3], final_norm=False) as teacher_taps:
        teacher(ids)
    cosines = []
    for layer in (1, 2, 3):
        ours, theirs = (x.states[layer][:, :-1].flatten(0, 1)[mask] for x in (taps, teacher_taps))
        cosines.append((1 - F.cosine_similarity(ours, theirs, dim=-1)).mean())
    hs_cosine = torch.stack(cosines).mean()
    expected = 0.2 * cross_entropy + 0.2 * kl + 0.6 * hs_cosine
    torch.testing.assert_close(result.loss, expected, rtol=1e-10, atol=1e-12)
    for name, value in {"cross_entropy": cross_entropy, "kl": kl, "hs_cosine": hs_cosine}.items():
        torch.testing.assert_close(result.sums[name] / result.counts[name], value.detach(), rtol=1e-10, atol=1e-12)
    # transformers' RMSNorm computes in float32, whose rounding differs between the two graphs.
    parameters = list(student.parameters())
    gradients = torch.autograd.grad(result.loss, parameters)
    for gradient, other in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cuts", [1, 2, 4])
@pytest.mark.parametrize("mapping", ["all", [(0, 0), (1, 2), (3, 3)]], ids=["all", "pairs"])
def test_a_step_does_not_depend_on_its_micro_batches(mapping, cuts):
    student, teacher = llama(seed=0), llama(seed=1)
    ids, targets = batch()
    objective = Objective(EVERYTHING, mapping, shape(student), shape(teacher), chunk_tokens=3)
    tokens = len(counted_rows(targets))
    with torch.no_grad():
        logits = teacher(ids).logits.flatten(0, 1)
    pairs = objective.preference_pairs(targets, lambda rows: lambda chunk: DenseDistribution(logits[rows[chunk]]), 2)
    whole = run(objective, student, teacher, ids, targets, tokens, pairs)
    whole.loss.backward()
    expected = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    loss, sums, counts = 0.0, 0.0, 0.0
    for some_ids, some_targets in zip(ids.chunk(cuts), targets.chunk(cuts), strict=True):
        part = run(objective, student, teacher, some_ids, some_targets, tokens, pairs)
        part.loss.backward()
        loss += part.loss.detach()
        sums += part.sums["hinge"]
        counts += part.counts["hinge"]
    torch.testing.assert_close(loss, whole.loss.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sums / counts, whole.sums["hinge"] / whole.counts["hinge"])
    torch.testing.assert_close(counts, pairs["hinge"], check_dtype=False)
    for parameter, gradient in zip(student.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-12)


def test_a_batch_in_which_nothing_counts_gives_zero_and_zero_gradients():
    student, teacher = llama(seed=0), llama(seed=1)
    ids, targets = batch()
    objective = Objective(EVERYTHING, "all", shape(student), shape(teacher))
    result = run(objective, student, teacher, ids, torch.full_like(targets, -100), 0)
    result.loss.backward()
    assert result.loss == 0
    assert all(torch.all(p.grad == 0) for p in student.parameters())


def test_the_teachers_word_on_an_uncounted_position_counts_nowhere():
    student, teacher = llama(seed=0), llama(seed=1)
    ids, targets = batch()
    objective = Objective(EVERYTHING, [(1, 1)], shape(student), shape(teacher))
    counted = torch.zeros(ids.numel(), dtype=torch.bool).index_fill(0, counted_rows(targets), True)
    with torch.no_grad():
        hidden = student.model(ids).last_hidden_state
        logits = teacher(ids).logits.flatten(0, 1)
        states = torch.randn(*ids.shape, 16).double()

    def loss(noise):
        def spoiled(x):
            return torch.where(counted.view(*ids.shape, 1), x, x + noise * torch.randn_like(x))

        noisy = spoiled(logits.view(*ids.shape, -1)).flatten(0, 1)

        def distribution(rows):
            return lambda chunk: DenseDistribution(noisy[rows[chunk]])

        return objective(
            spoiled(hidden),
            student.lm_head.weight,
            None,
            targets,
            distribution,
            {1: spoiled(states)},
            {1: spoiled(states.flip(0))},
            7,
            objective.preference_pairs(targets, distribution),
        ).loss

    assert torch.equal(loss(noise=0.0), loss(noise=10.0))


def test_another_width_and_depth_learn_projections():
    student, teacher = llama(hidden_size=12, layers=2), llama(hidden_size=16, layers=4, seed=1)
    ids, targets = batch()
    pairs = [(0, 0), (1, 2), (2, 4)]
    objective = Objective(FLAGSHIP, pairs, shape(student), shape(teacher)).double()
    assert [tuple(p.weight.shape) for p in objective.projections] == [(16, 12)] * 3
    assert objective.student_layers == [0, 1, 2] and objective.teacher_layers == [0, 2, 4]
    result = run(objective, student, teacher, ids, targets, 7)
    result.loss.backward()
    assert all(p.grad.norm() > 0 for p in objective.parameters())

    mask = targets != -100
    outputs, teacher_outputs = (model(ids, output_hidden_states=True) for model in (student, teacher))
    expected = [
        HIDDEN_STATE_LOSSES["hs_cosine"](
            projection(outputs.hidden_states[i][mask]), teacher_outputs.hidden_states[j][mask]
        )[0].sum()
        for (i, j), projection in zip(pairs, objective.projections, strict=True)
    ]
    torch.testing.assert_close(result.sums["hs_cosine"], torch.stack(expected).mean().detach())


def test_projections_where_they_are_needed_or_forced():
    shapes = ModelShape(8, 2), ModelShape(8, 2)
    assert len(Objective(FLAGSHIP, "all", *shapes).projections) == 0
    assert len(Objective(FLAGSHIP, "all", *shapes, force_hidden_state_projection=True).projections) == 2
    assert not list(Objective(FLAGSHIP[:2], "all", *shapes, force_hidden_state_projection=True).parameters())


def test_hidden_state_losses_keep_nothing_but_their_inputs():
    objective = Objective(FLAGSHIP, "all", ModelShape(8, 2), ModelShape(8, 2))
    states = {layer: torch.randn(2, 5, 8, requires_grad=True) for layer in (1, 2)}
    theirs = {layer: torch.randn(2, 5, 8) for layer in (1, 2)}
    inputs = {x.data_ptr() for x in (*states.values(), *theirs.values())}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        objective._hidden_sum(HIDDEN_STATE_LOSSES["hs_cosine"], torch.ones(10, dtype=torch.bool), states, theirs)
    assert {x.data_ptr() for x in kept if x.is_floating_point() and x.numel() > 8} <= inputs


def test_works_in_bfloat16_under_autocast_and_without_gradients():
    student, teacher = llama(hidden_size=12).float(), llama(seed=1).float()
    ids, targets = batch()
    objective = Objective(EVERYTHING, "all", shape(student), shape(teacher))
    exact = run(objective, student, teacher, ids, targets, 7)
    with torch.autocast("cpu", torch.bfloat16):
        result = run(objective, student, teacher, ids, targets, 7)
    result.loss.backward()
    assert result.loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in [*student.parameters(), *objective.parameters()])
    torch.testing.assert_close(result.loss, exact.loss, rtol=2e-2, atol=2e-2)
    with torch.no_grad():
        evaluated = run(objective, student, teacher, ids, targets, 7)
    torch.testing.assert_close(evaluated.loss, exact.loss.detach())


def test_cross_entropy_alone_needs_no_teacher():
    objective = Objective(FLAGSHIP[:1])
    assert not objective.needs_teacher and Objective(FLAGSHIP[:2]).needs_teacher
    student = llama()
    ids, targets = batch()
    hidden = student.model(ids).last_hidden_state
    result = objective(hidden, student.lm_head.weight, None, targets, None, {}, {}, len(counted_rows(targets)))
    torch.testing.assert_close(
        result.loss.float(), student(ids, labels=F.pad(targets[:, :-1], (1, 0), value=-100)).loss
    )


def test_weights_are_shares_and_a_repeated_function_has_a_number():
    losses = [LossConfig(function="kl", weight=2, temperature=t) for t in (1.0, 2.0)]
    terms = Objective([*losses, LossConfig(function="hinge", weight=4, margin=0.1, sparse_chunk_length=64)]).terms
    assert [term.name for term in terms] == ["kl", "kl_2", "hinge"]
    assert [term.weight for term in terms] == [0.25, 0.25, 0.5]
    assert [term.options for term in terms] == [{"temperature": 1.0}, {"temperature": 2.0}, {"margin": 0.1}]
    assert Objective(losses).chunk_tokens is None
    hinted = LossConfig(function="kl", weight=1, sparse_chunk_length=64)
    assert Objective([hinted]).chunk_tokens == 64


def test_ranking_losses_ask_for_the_pairs_of_the_step():
    student = llama()
    objective = Objective([LossConfig(function="hinge", weight=1)])
    ids, targets = batch()
    with pytest.raises(ValueError, match="preference_pairs"):
        objective(student.model(ids).last_hidden_state, student.lm_head.weight, None, targets, None, {}, {}, 7)


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ("all", "layer_mapping: all needs models of equal depth; the student has 2 layers, the teacher 4"),
        ([(1, 1), (3, 3)], r"layer_mapping\[1\]: the student has no hidden state 3; 0 \(embeddings\) to 2"),
        ([(1, 5)], r"layer_mapping\[0\]: the teacher has no hidden state 5; .* to 4"),
        (None, "layer_mapping: is missing"),
    ],
)
def test_a_mapping_that_the_models_do_not_have_is_refused(mapping, said):
    with pytest.raises(UserError, match=said):
        Objective(FLAGSHIP, mapping, ModelShape(8, 2), ModelShape(8, 4))
