"""A compiled step is the step: losses and gradients, of the student and of what it learns from."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from distillkit.config import LossConfig
from distillkit.losses import ModelShape, Objective
from distillkit.models.attention import trained_attention
from distillkit.training.compilation import Compilation, compiled_step
from distillkit.training.distiller import Distiller
from distillkit.training.setup import checkpoint_layers
from tests.student.students import student
from tests.training.tiny import VOCAB, batch, llama, row, teacher_for

SHAPE = {"hidden_size": 32, "vocab_size": VOCAB, "initializer_range": 0.2}
ONE_PHASE = [
    LossConfig(function="cross_entropy", weight=0.2),
    LossConfig(function="kl", weight=0.2, temperature=2.0),
    LossConfig(function="hs_cosine", weight=0.6),
]
ALIGNMENT = [LossConfig(function="attn_mse", weight=1.0)]
BATCHES = [batch(row([5, 1, 70], seed=3)), batch(row([40, 36], seed=4)), batch(row([20, 20, 36], seed=5))]

LAYERS = 4
runs = []


def counting(graph, inputs):
    """Compile as aot_eager does, and keep record of each run."""
    compiled = aot_eager(graph, inputs)
    return lambda *given: runs.append(graph) or compiled(*given)


def steps(losses, *, backend=None, checkpointing=False, top_k=None, batches=BATCHES):
    """The losses of some batches one after the other, and the sum of their gradients."""
    model, teacher = student(config_changes=SHAPE).double().train(), llama(0, layers=LAYERS, dtype=torch.float64)
    if checkpointing:
        checkpoint_layers(model, {"use_reentrant": False})
    shapes = [ModelShape(each.config.hidden_size, each.config.num_hidden_layers) for each in (model, teacher)]
    aligned = list(trained_attention(model)) if losses is ALIGNMENT else []
    objective = Objective(losses, "all", *shapes, attention_layers=aligned, chunk_tokens=32)
    online = teacher_for(objective, teacher, top_k=top_k)
    distiller = Distiller(model, objective)

    def run():
        outputs = []
        for each in batches:
            output = distiller(**each, normalizer=torch.tensor(90.0), signal=online.signal(each))
            output["loss"].backward()
            outputs.append({"loss": output["loss"].detach(), **output["sums"]})
        return outputs

    if backend is None:
        return run(), {name: parameter.grad for name, parameter in model.named_parameters()}
    parts = [part for each in (model, teacher) for layer in each.model.layers for part in layer.children()]
    names, own = list(model.state_dict()), teacher.model.layers[0].mlp.forward
    teacher.model.layers[0].mlp.forward = own  # as accelerate's hooks of a dispatched model stand there
    with compiled_step(model, teacher, objective, Compilation(backend, None)):
        found = run()
        assert all("forward" in vars(part) for part in parts)
        assert list(model.state_dict()) == names
    assert [part for part in parts if "forward" in vars(part)] == [teacher.model.layers[0].mlp]
    assert teacher.model.layers[0].mlp.forward == own
    return found, {name: parameter.grad for name, parameter in model.named_parameters()}


def test_layers_that_are_checkpointed_keep_what_kernels_would_make_again():
    model = student(config_changes=SHAPE)
    checkpoint_layers(model, {"use_reentrant": False, "every_n_layers": 2})
    kept = {
        index: getattr(layer.self_attn, "keep_intermediates", None) for index, layer in enumerate(model.model.layers)
    }
    assert kept == {0: True, 1: False, 2: True, 3: None}  # the last has full attention


@pytest.mark.parametrize(
    "case",
    [
        {"losses": ONE_PHASE},
        {"losses": ONE_PHASE, "top_k": 7},
        {"losses": ONE_PHASE, "checkpointing": True},
        {"losses": ALIGNMENT},
    ],
    ids=["dense", "sparse", "checkpointing", "alignment"],
)
def test_a_compiled_step_has_the_losses_and_gradients_of_the_step(case):
    expected, expected_gradients = steps(**case)
    runs.clear()
    found, gradients = steps(**case, backend=counting)
    of_student = 1 if case["losses"] is ALIGNMENT else 4  # its attention alone, or every part of a layer
    assert len(runs) >= (4 + of_student) * LAYERS * len(BATCHES)
    ran = {str(node.target) for graph in runs for node in graph.graph.nodes}
    if case["losses"] is ONE_PHASE:
        assert any("log_softmax" in each for each in ran) and any("cosine_similarity" in each for each in ran)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(gradients, expected_gradients)


def test_batches_of_any_number_of_documents_are_served_by_the_same_graphs():
    """With torch 2.11 a frozen dataclass among the arguments fails here; 2.13 looks at what it holds only when used."""
    compiled, known = [], []

    def backend(graph, inputs):
        compiled.append(graph)
        return aot_eager(graph, inputs)

    def batches():
        for number in (2, 5, 3, 4, 7, 9, 12, 20, 30):
            known.append(len(compiled))
            yield batch(row([*[2] * (number - 1), 78 - 2 * number], seed=number))

    torch._dynamo.reset()
    steps(ONE_PHASE, backend=backend, batches=batches())
    assert len(compiled) == known[2] > 0
