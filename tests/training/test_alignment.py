"""Attention alignment: the student's attention of each layer on the teacher's input of that layer, nothing else."""

import json

import pytest
import torch
from safetensors.torch import load_file

from distillkit.config import LossConfig, UserError
from distillkit.losses import ModelShape, Objective
from distillkit.models.attention import trained_attention
from distillkit.training.distiller import Distiller
from distillkit.training.freezing import freeze
from distillkit.training.precision import cast_for_training
from tests.student.students import student
from tests.training.captures import configuration
from tests.training.captures import run as run_configuration
from tests.training.tiny import VOCAB, batch, documents, llama, row, save_llama, save_text, teacher_for

SHAPE = {"hidden_size": 32, "vocab_size": VOCAB, "initializer_range": 0.2}
STUDENTS = {
    "full attention": lambda: llama(1, layers=4),
    "hybrid": lambda: student(config_changes=SHAPE),
    "hybrid, grouped": lambda: student(config_changes=SHAPE, kv_heads="grouped", use_rope=True),
    "KDA only": lambda: student(layout="kda_only", config_changes=SHAPE),
    "another family": lambda: student("qwen3", config_changes=SHAPE),
}
LENGTHS = [5, 1, 70, 3, 64, 2]
ALIGNMENT = [LossConfig(function="attn_mse", weight=1.0), LossConfig(function="attn_cosine", weight=3.0)]
KL = LossConfig(function="kl", weight=1.0, temperature=2.0)


def distiller_of(model, teacher_model, losses, top_k=None):
    shapes = [ModelShape(each.config.hidden_size, each.config.num_hidden_layers) for each in (model, teacher_model)]
    objective = Objective(losses, None, *shapes, attention_layers=list(trained_attention(model)))
    teacher = teacher_for(objective, teacher_model, top_k=top_k)
    return Distiller(model, objective), teacher


def differentiated(model, losses=ALIGNMENT, batches=None, top_k=None, normalizer=100.0, teacher=torch.float64):
    """The sum of the batches' losses, each loss's sum over all of them, and the gradients by name."""
    model = model.double().train()
    distiller, online = distiller_of(model, llama(0, layers=4, dtype=teacher), losses, top_k)
    loss, sums = torch.zeros((), dtype=torch.float64), {}
    for each in [batch(row(LENGTHS, seed=3))] if batches is None else batches:
        output = distiller(**each, normalizer=torch.tensor(normalizer), signal=online.signal(each))
        output["loss"].backward()
        loss += output["loss"].detach()
        sums = {name: sums.get(name, 0) + value for name, value in output["sums"].items()}
    return loss, sums, {name: parameter.grad for name, parameter in model.named_parameters()}


def slow_reference(model, packed, normalizer=100.0):
    """Document by document, layer by layer and token by token, without padding; each loss is the mean over layers."""
    model, teacher = model.double().train(), llama(0, layers=4, dtype=torch.float64)
    seen = {}
    for index, layer in enumerate(teacher.model.layers):
        layer.self_attn.register_forward_hook(
            lambda _, args, kwargs, output, index=index: seen.update({index: (kwargs["hidden_states"], output[0])}),
            with_kwargs=True,
        )
    mse, cosine = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for document in documents(packed):
        targets, length = document["targets"][0], document["targets"].shape[1]
        with torch.no_grad():
            teacher(document["input_ids"])
        positions = torch.arange(length).unsqueeze(0)
        rotation = model.model.rotary_emb(seen[0][0], positions)
        for index, layer in enumerate(model.model.layers):
            given, wanted = seen[index]
            output = layer.self_attn(hidden_states=given, position_embeddings=rotation, attention_mask=None)[0]
            for token in range(length - 1):
                if targets[token] == -100:
                    continue
                ours, theirs = output[0, token], wanted[0, token]
                mse = mse + ((ours - theirs) ** 2).mean() / 4
                cosine = cosine + (1 - ours @ theirs / (ours.norm() * theirs.norm())) / 4
    loss = (0.25 * mse + 0.75 * cosine) / normalizer
    loss.backward()
    return loss, {"attn_mse": mse, "attn_cosine": cosine}, {n: p.grad for n, p in model.named_parameters()}


def assert_same(actual, expected, tolerance=1e-9):
    (loss, sums, gradients), (other_loss, other_sums, other_gradients) = actual, expected
    torch.testing.assert_close(loss, other_loss.detach(), rtol=tolerance, atol=0)
    assert sums.keys() == other_sums.keys()
    for name, value in other_sums.items():
        torch.testing.assert_close(sums[name], value.detach(), rtol=tolerance, atol=0, msg=name)
    largest = max(gradient.abs().max() for gradient in other_gradients.values() if gradient is not None)
    assert largest > 1e-4
    for name, gradient in other_gradients.items():
        if gradient is None:
            assert gradients[name] is None, name
        else:
            assert (gradients[name] - gradient).abs().max() <= tolerance * largest, name


@pytest.mark.parametrize("kind", STUDENTS)
def test_equals_each_layer_called_by_hand_on_each_document(kind):
    packed = row(LENGTHS, seed=3, ignored=1)
    padded = batch(packed, sequence_length=sum(LENGTHS) + 4)
    tolerance = 1e-7 if kind == "another family" else 1e-9  # Qwen3 norms queries and keys in float32
    reference = slow_reference(STUDENTS[kind](), packed)
    assert_same(differentiated(STUDENTS[kind](), batches=[padded]), reference, tolerance)


@pytest.mark.parametrize("kind", STUDENTS)
def test_nothing_but_attention_has_a_gradient(kind):
    _, _, gradients = differentiated(STUDENTS[kind]())
    for name, gradient in gradients.items():
        assert (gradient is not None) == (".self_attn." in name), name


def test_layers_are_independent():
    def gradients_of_the_last(perturbed):
        model = STUDENTS["hybrid"]()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(part in name for part in perturbed):
                    parameter.add_(torch.randn_like(parameter))
        return {name: each for name, each in differentiated(model)[2].items() if "layers.3.self_attn" in name}

    calm = gradients_of_the_last(())
    stirred = gradients_of_the_last(("layers.0.", "layers.1.", "mlp", "norm.", "embed_tokens", "lm_head"))
    assert calm and all(torch.equal(stirred[name], gradient) for name, gradient in calm.items())


def test_rows_and_micro_batches_add_up():
    rows = [row([5, 7], seed=1), row([12], seed=2, ignored=9)]
    together = differentiated(STUDENTS["hybrid"](), batches=[batch(*rows)])
    assert_same(differentiated(STUDENTS["hybrid"](), batches=[batch(each) for each in rows]), together)


def test_gradient_checkpointing_changes_nothing():
    expected = differentiated(STUDENTS["hybrid"]())
    checkpointed = STUDENTS["hybrid"]()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(differentiated(checkpointed), expected)


@pytest.mark.parametrize("top_k", [None, 7])
def test_beside_other_losses_it_is_a_weighted_sum(top_k):
    both = [LossConfig(function="attn_mse", weight=3.0), KL]
    loss, sums, gradients = differentiated(STUDENTS["hybrid"](), both, top_k=top_k)
    parts = [differentiated(STUDENTS["hybrid"](), [each], top_k=top_k) for each in both]
    torch.testing.assert_close(loss, 0.75 * parts[0][0] + 0.25 * parts[1][0])
    assert sums == {**parts[0][1], **parts[1][1]}
    for name, gradient in gradients.items():
        of_attention = 0 if parts[0][2][name] is None else parts[0][2][name]
        torch.testing.assert_close(gradient, 0.75 * of_attention + 0.25 * parts[1][2][name], msg=name)


def test_beside_other_losses_it_shares_the_weights_that_autocast_has_cast():
    def gradients(losses):
        model = STUDENTS["hybrid"]()
        distiller, teacher = distiller_of(model, llama(0, layers=4), losses)
        packed = batch(row(LENGTHS, seed=3))
        with torch.autocast("cpu", torch.bfloat16):
            output = distiller(**packed, normalizer=torch.tensor(100.0), signal=teacher.signal(packed))
        output["loss"].backward()
        return {name: each.grad for name, each in model.named_parameters()}

    aligned = LossConfig(function="attn_mse", weight=1.0)
    both, one, other = (gradients(losses) for losses in ([aligned, KL], [aligned], [KL]))
    for name, gradient in both.items():
        expected = 0.5 * other[name] + (0 if one[name] is None else 0.5 * one[name])
        assert (gradient - expected).norm() <= 0.02 * expected.norm(), name


def test_frozen_attention_is_neither_recorded_nor_compared():
    model = STUDENTS["hybrid"]()
    freeze(model, [r"layers\.[013]\.self_attn"])
    distiller, teacher = distiller_of(model, llama(0, layers=4), ALIGNMENT)
    packed = batch(row(LENGTHS))
    signal = teacher.signal(packed)
    assert list(signal.attention) == [2]
    distiller(**packed, normalizer=torch.tensor(1.0), signal=signal)["loss"].backward()
    assert {name.split(".")[2] for name, each in model.named_parameters() if each.grad is not None} == {"2"}


def test_neither_layers_nor_heads_run():
    model, teacher_model = STUDENTS["hybrid"](), llama(0, layers=4)
    distiller, teacher = distiller_of(model, teacher_model, ALIGNMENT)
    ran = []
    for owner, whole in (("student", model), ("teacher", teacher_model)):
        for name, module in whole.named_modules():
            module.register_forward_hook(lambda *_, name=f"{owner} {name}": ran.append(name))
    packed = batch(row(LENGTHS))
    distiller(**packed, normalizer=torch.tensor(1.0), signal=teacher.signal(packed))["loss"].backward()
    assert not [name for name in ran if "lm_head" in name or (name.startswith("student") and "mlp" in name)]
    assert ran.count("student model.layers.2.self_attn") == 1
    assert "student model.layers.2.input_layernorm" not in ran


def test_without_gradients_the_loss_is_the_same():
    model = STUDENTS["hybrid"]().double()
    distiller, teacher = distiller_of(model, llama(0, layers=4, dtype=torch.float64), ALIGNMENT)
    packed = batch(row(LENGTHS, seed=3))
    with torch.no_grad():
        output = distiller(**packed, normalizer=torch.tensor(100.0), signal=teacher.signal(packed))
    torch.testing.assert_close(output["loss"], differentiated(STUDENTS["hybrid"]())[0], rtol=1e-9, atol=0)


def test_where_nothing_counts_loss_and_gradients_are_zero():
    silent = {**batch(row(LENGTHS)), "targets": torch.full((1, sum(LENGTHS)), -100)}
    loss, _, gradients = differentiated(STUDENTS["hybrid"](), batches=[silent], normalizer=0.0)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients.values() if gradient is not None)


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16], ids=["masters", "without masters"])
def test_a_teacher_in_bf16_teaches_under_autocast(trained):
    model, teacher_model = STUDENTS["hybrid"](), llama(0, layers=4)
    packed = batch(row(LENGTHS, seed=3))
    exact = differentiated(STUDENTS["hybrid"](), teacher=torch.bfloat16)
    freeze(model, ["mlp", r"norm\.weight", "embed_tokens"])
    cast_for_training(model, torch.bfloat16, trained)
    distiller, teacher = distiller_of(model, teacher_model.bfloat16(), ALIGNMENT)
    with torch.autocast("cpu", torch.bfloat16):
        output = distiller(**packed, normalizer=torch.tensor(100.0), signal=teacher.signal(packed))
    output["loss"].backward()
    assert output["loss"].dtype == torch.float32
    torch.testing.assert_close(output["loss"].double(), exact[0], rtol=1e-3, atol=0)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == parameter.dtype
            difference = (parameter.grad - exact[2][name]).norm() / exact[2][name].norm()
            assert difference < 0.05, (name, difference)


def test_a_bf16_teacher_of_a_float32_student_is_heard_in_float32():
    model = STUDENTS["hybrid"]()
    distiller, teacher = distiller_of(model, llama(0, layers=4, dtype=torch.bfloat16), ALIGNMENT)
    packed = batch(row(LENGTHS, seed=3))
    output = distiller(**packed, normalizer=torch.tensor(100.0), signal=teacher.signal(packed))
    exact = differentiated(STUDENTS["hybrid"](), teacher=torch.bfloat16)
    torch.testing.assert_close(output["loss"].double(), exact[0], rtol=1e-6, atol=0)


def test_activations_are_those_of_one_layer():
    model = STUDENTS["hybrid"]()
    distiller, teacher = distiller_of(model, llama(0, layers=4), ALIGNMENT)
    packed = batch(row(LENGTHS))
    signal = teacher.signal(packed)
    output = distiller(**packed, normalizer=torch.tensor(1.0), signal=signal)
    kept, nodes = set(), [output["loss"].grad_fn]
    while nodes:
        node = nodes.pop()
        kept |= {tuple(tensor.shape) for tensor in getattr(node, "saved_tensors", ())}
        nodes += [following for following, _ in node.next_functions if following is not None]
    assert kept <= {tuple(parameter.shape) for parameter in model.parameters()} | {()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "teacher": save_llama(folder / "teacher", 0),
        "deeper": save_llama(folder / "deeper", 0, layers=3),
        "wider": save_llama(folder / "wider", 0, hidden_size=48),
        "student": save_llama(folder / "student", 1),
        "text": save_text(folder / "train.jsonl"),
    }


def of_text(inputs, folder, teacher="teacher", losses=ALIGNMENT, **changes):
    return configuration(
        inputs["student"],
        "",
        folder,
        teacher={"kind": "hf", "path": inputs[teacher]},
        dataset={"train_dataset": {"disk_path": inputs["text"]}},
        loss_functions=[loss.model_dump(exclude_none=True) for loss in losses],
        **changes,
    )


def test_a_run_trains_attention_alone_and_says_what_rests(inputs, tmp_path):
    said = run_configuration(of_text(inputs, tmp_path / "run", training={"optim": "adamw_torch", "weight_decay": 0.1}))
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (inputs["student"], tmp_path / "run"))
    assert all(torch.equal(before[name], after[name]) == ("self_attn" not in name) for name in after)
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(0.25 * line["attn_mse"] + 0.75 * line["attn_cosine"], rel=1e-5)
    trained = sum(tensor.numel() for name, tensor in after.items() if "self_attn" in name)
    rests = sum(tensor.numel() for tensor in after.values()) - trained
    assert f"no loss reaches {rests:,} parameters that are not frozen (model.embed_tokens.weight, " in said
    counted = json.loads((tmp_path / "run/results.json").read_text())["parameters"]
    assert counted == {"trained": trained, "frozen": rests}


def test_what_is_frozen_by_name_is_not_news(inputs, tmp_path):
    said = run_configuration(of_text(inputs, tmp_path / "run", frozen_res=["embed_tokens", "norm", "mlp"]))
    assert "no loss reaches" not in said


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"teacher": "deeper"}, "equal depth and width; the student has 2 layers of width 32, the teacher 3 layers of"),
        ({"teacher": "wider"}, "the student has 2 layers of width 32, the teacher 2 layers of width 48; use hs_mse"),
        ({"frozen_res": ["self_attn"]}, "has nothing to train: all of the student's attention is frozen"),
    ],
    ids=["depth", "width", "frozen"],
)
def test_models_that_cannot_be_aligned_are_refused_in_a_line(inputs, tmp_path, changes, line):
    losses = [KL, LossConfig(function="attn_mse", weight=1.0)]
    with pytest.raises(UserError, match=rf"loss_functions\[1\]\.function: attn_mse .*{line}"):
        run_configuration(of_text(inputs, tmp_path / "run", losses=losses, **changes))


def test_a_captured_teacher_does_not_tell_its_attention(inputs, tmp_path):
    losses = [{"function": "attn_mse", "weight": 1.0}]
    with pytest.raises(
        UserError, match=r"loss_functions\[0\]\.function: attn_mse needs a teacher of kind: hf; dataset"
    ):
        configuration(inputs["student"], inputs["text"], tmp_path / "run", loss_functions=losses)


@pytest.mark.parametrize("options", [{}, {"torch_compile_backend": "eager"}, {"gradient_checkpointing": True}])
def test_an_aligned_student_comes_nearer_and_keeps_its_progress(inputs, tmp_path, options):
    training = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 6, "per_device_train_batch_size": 4}
    run_configuration(of_text(inputs, tmp_path / "run", training={**training, **options}))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["attn_mse"] < 0.5 * lines[0]["attn_mse"]
