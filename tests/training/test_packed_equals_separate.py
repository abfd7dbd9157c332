"""A row of packed documents has the loss and the gradients of its documents run one by one, in every loss.

Nothing may cross a boundary: no attention, no state or convolution of a KDA layer, no label, no teacher distribution.
"""

import pytest
import torch

from distillkit.config import LossConfig
from distillkit.losses import DISTRIBUTION_LOSSES, HIDDEN_STATE_LOSSES, ModelShape, Objective
from distillkit.training.distiller import Distiller
from tests.student.students import student
from tests.training.tiny import VOCAB, batch, documents, llama, row, teacher_for

LENGTHS = [5, 1, 70, 3, 64, 2]  # a KDA layer works on 64 tokens at a time, a convolution looks 3 tokens back
NAMES = [*DISTRIBUTION_LOSSES, *HIDDEN_STATE_LOSSES]
SHAPE = {"hidden_size": 32, "vocab_size": VOCAB, "initializer_range": 0.2}
STUDENTS = {
    "full attention": lambda: llama(1, layers=4),
    "hybrid": lambda: student(config_changes=SHAPE),
    "hybrid, grouped": lambda: student(config_changes=SHAPE, kv_heads="grouped", use_rope=True),
    "KDA only": lambda: student(layout="kda_only", config_changes=SHAPE),
}
OPTIONS = {"kl": {"temperature": 2.0}, "hinge": {"margin": 0.1}}
LOSSES = [LossConfig(function=name, weight=1.0, **OPTIONS.get(name, {})) for name in NAMES]


def distilled(kind, batches, top_k=None, layer_mapping="all", width=32):
    """The sum of the batches' losses, each loss's sums and counts, and the gradients."""
    model = STUDENTS[kind]().double().train()
    teacher_model = llama(0, layers=4, hidden_size=width, dtype=torch.float64)
    shapes = [ModelShape(each.config.hidden_size, each.config.num_hidden_layers) for each in (model, teacher_model)]
    torch.manual_seed(0)
    objective = Objective(LOSSES, layer_mapping, *shapes, chunk_tokens=31).double()
    distiller = Distiller(model, objective)
    teacher = teacher_for(objective, teacher_model, top_k=top_k)
    normalizer = torch.tensor(float(sum(LENGTHS)))
    totals, loss = {}, torch.zeros((), dtype=torch.float64)
    for each in batches:
        signal = teacher.signal(each)
        pairs = {"hinge": torch.tensor(900.0), "logistic_ranking": torch.tensor(700.0)}
        output = distiller(**each, normalizer=normalizer, preference_pairs=pairs, signal=signal)
        output["loss"].backward()
        loss += output["loss"].detach()
        for name in NAMES:
            said = torch.stack([output["sums"][name].double(), output["counts"][name].double()])
            totals[name] = totals.get(name, torch.zeros(2, dtype=torch.float64)) + said
    return loss, totals, {name: parameter.grad for name, parameter in distiller.named_parameters()}


@pytest.mark.parametrize("top_k", [None, 7])
@pytest.mark.parametrize(
    "mapping", [{}, {"layer_mapping": [(0, 0), (2, 1), (4, 4)], "width": 48}], ids=["all layers", "projected pairs"]
)
@pytest.mark.parametrize("kind", STUDENTS)
def test_packed_equals_separate(kind, mapping, top_k):
    whole = row(LENGTHS, seed=3)
    packed = batch(whole, sequence_length=sum(LENGTHS) + 4)
    loss, totals, gradients = distilled(kind, [packed], top_k, **mapping)
    alone_loss, alone_totals, alone_gradients = distilled(kind, documents(whole), top_k, **mapping)
    torch.testing.assert_close(loss, alone_loss, rtol=1e-9, atol=0)
    for name in NAMES:
        torch.testing.assert_close(totals[name], alone_totals[name], rtol=1e-9, atol=0, msg=name)
        assert totals[name][0] > 0
    assert totals["kl"][1] == sum(LENGTHS) - len(LENGTHS)
    largest = max(gradient.abs().max() for gradient in alone_gradients.values())
    for name, gradient in alone_gradients.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-9 * largest, name


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_boundary_makes_a_difference(kind):
    """What the test above would see if documents saw one another."""
    packed = batch(row(LENGTHS, seed=3))
    joined = {**packed, "position_ids": torch.arange(sum(LENGTHS)).unsqueeze(0)}
    totals, of_joined = (distilled(kind, [each])[1] for each in (packed, joined))
    for name in NAMES:
        assert abs(totals[name][0] - of_joined[name][0]) > 1e-6 * totals[name][0], name
