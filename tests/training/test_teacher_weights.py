"""A teacher with quantised weights is near the whole one, and told of; one with offloaded layers is the whole one."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from distillkit.config import RunConfig, UserError, check_ready, resolve
from distillkit.config.capture import CaptureConfig
from distillkit.models.float8 import exchange
from distillkit.models.loading import load_model
from distillkit.models.placement import devices_of_process, offload_layers, own_devices, refuse_spilled
from distillkit.models.quantization import quantization_arguments
from distillkit.planning import plan_run
from distillkit.runs.record import read_record
from distillkit.teacher import SignalRequest
from distillkit.teacher.live import LiveTeacher
from tests.training.captures import configuration, first_step, run
from tests.training.tiny import batch, llama, row, save_llama, save_text

QUANTIZED = ["int8"]
OTHERS = [
    pytest.param(
        kind,
        marks=pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is missing"),
    )
    for kind in ("bitsandbytes_8bit", "bitsandbytes_4bit")
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    model = llama(0, vocab=259, hidden_size=128, layers=1)
    with torch.no_grad():  # as small as those of trained models are, for large logits show every rounding
        for parameter in model.model.layers.parameters():
            parameter.mul_(0.3 if parameter.dim() == 2 else 1)
    save_llama(folder / "teacher", 0, hidden_size=128, layers=1)
    model.save_pretrained(folder / "teacher")
    return {
        "teacher": str(folder / "teacher"),
        "student": save_llama(folder / "student", 1),
        "text": save_text(folder / "train.jsonl"),
    }


def described(inputs, folder, **changes):
    teacher = {"path": inputs["teacher"], **changes.pop("teacher", {})}
    dataset = {"train_dataset": {"disk_path": inputs["text"]}}
    losses = [{"function": "kl", "weight": 1.0}]
    given = {"loss_functions": losses, "dataset": dataset, "teacher": teacher, **changes}
    return configuration(inputs["student"], "", folder, **given)


@torch.no_grad()
def logits(model):
    made = batch(row([20], seed=1))
    return LiveTeacher(model).signal(made).distribution(torch.arange(20))(slice(0, 20)).logits


@pytest.mark.parametrize("kind", [*QUANTIZED, *OTHERS])
def test_linear_layers_are_quantised_and_logits_are_near(inputs, kind):
    whole = load_model(inputs["teacher"])
    model = load_model(inputs["teacher"], **quantization_arguments(kind, torch.float32, torch.device("cpu")))
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        weight = model.model.layers[0].get_submodule(name).weight
        assert type(weight) is not type(whole.model.layers[0].get_submodule(name).weight), name
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(model.get_parameter(name), whole.get_parameter(name)), name
    wanted, found = logits(whole), logits(model)
    error = (found - wanted).std() / wanted.std()
    assert 1e-3 < error < {"bitsandbytes_4bit": 0.3}.get(kind, 0.05), error


@pytest.mark.parametrize("kind", [*QUANTIZED, "float8"])
def test_a_run_trains_on_it_and_tells_of_it(inputs, tmp_path, kind):
    quantized = {"quantization": kind}
    live = first_step(described(inputs, tmp_path / "live"))
    step = first_step(described(inputs, tmp_path / "step", teacher=quantized))
    assert step[0]["kl"] == pytest.approx(live[0]["kl"], rel=0.05)
    assert step[0]["kl"] != live[0]["kl"]
    said = run(described(inputs, tmp_path / "out", teacher=quantized))
    assert f"teacher: linear layers are {kind}, embeddings and head torch.float32" in said
    assert read_record(tmp_path / "out").config["teacher"]["quantization"] == kind
    assert f"linear layers of the teacher quantised to {kind}" in (tmp_path / "out" / "report.html").read_text()
    assert f"(quantised to {kind})" in (tmp_path / "out" / "README.md").read_text()


def test_products_of_a_float8_teacher_are_float8_and_logits_are_near(inputs):
    whole, model = (load_model(inputs["teacher"]).requires_grad_(False) for _ in range(2))
    exchange(model, "teacher.quantization")
    assert not any(isinstance(each, nn.Linear) for each in model.model.modules())
    assert isinstance(model.lm_head, nn.Linear)
    wanted, found = logits(whole), logits(model)
    assert 1e-3 < (found - wanted).std() / wanted.std() < 0.1


def test_a_student_is_converted_from_the_whole_teacher_before_that_is_float8(inputs, tmp_path):
    """The weights that the run starts with are those without quantization."""
    files = []
    for name, teacher in (("whole", {}), ("float8", {"quantization": "float8"})):
        given = described(inputs, tmp_path / name, teacher=teacher).model_dump(exclude={"model"})
        run(RunConfig.parse({**given, "student": {"full_attention_layers": []}}))
        files.append(load_file(tmp_path / name / "untrained" / "model.safetensors"))
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(each, files[1][name]) for name, each in files[0].items())


def assert_offloaded(model):
    for layer in model.model.layers:
        assert all(weight.is_meta for weight in layer.parameters())  # but while it runs
    assert not any(model.get_parameter(name).is_meta for name in ("lm_head.weight", "model.norm.weight"))


def test_an_offloaded_teacher_gives_the_same_outputs(inputs):
    made, request = batch(row([12, 8], seed=1)), SignalRequest(hidden_states=(0, 1), attention=(0,))
    whole = LiveTeacher(load_model(inputs["teacher"])).signal(made, request)
    model = offload_layers(load_model(inputs["teacher"]), torch.device("cpu"))
    given = LiveTeacher(model).signal(made, request)
    rows = torch.arange(20)
    assert torch.equal(given.distribution(rows)(slice(0, 20)).logits, whole.distribution(rows)(slice(0, 20)).logits)
    assert all(torch.equal(given.hidden_states[index], whole.hidden_states[index]) for index in (0, 1))
    assert torch.equal(given.attention[0].output, whole.attention[0].output)
    assert_offloaded(model)


def test_a_run_with_an_offloaded_teacher_is_the_run_without(inputs, tmp_path):
    losses = [{"function": "kl", "weight": 0.5}, {"function": "hs_mse", "weight": 0.5}]
    others = {"loss_functions": losses, "layer_mapping": [(0, 0), (2, 1)], "force_hidden_state_projection": True}
    steps = [
        first_step(described(inputs, tmp_path / name, teacher=teacher, **others))
        for name, teacher in (("whole", {}), ("offloaded", {"offload": "cpu"}))
    ]
    assert steps[0][0] == steps[1][0]
    assert all(torch.equal(gradient, steps[1][1][name]) for name, gradient in steps[0][1].items())


@pytest.mark.gpu
def test_an_offloaded_teacher_computes_on_the_gpu(inputs):
    whole, device = load_model(inputs["teacher"]).cuda(), torch.device("cuda")
    model = offload_layers(load_model(inputs["teacher"]), device)
    made = {name: tensor.to(device) for name, tensor in batch(row([20], seed=1)).items()}
    rows = torch.arange(20, device=device)
    wanted, found = (LiveTeacher(each).signal(made).distribution(rows)(slice(0, 20)).logits for each in (whole, model))
    assert found.is_cuda and torch.equal(found, wanted)
    assert_offloaded(model)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs three GPUs")
def test_layers_lie_on_gpus_of_their_own(inputs):
    whole, model = load_model(inputs["teacher"]).cuda(), load_model(inputs["teacher"], **own_devices([1, 2]))
    made = {name: tensor.cuda() for name, tensor in batch(row([20], seed=1)).items()}
    rows = torch.arange(20, device="cuda")
    wanted, found = (LiveTeacher(each).signal(made).distribution(rows)(slice(0, 20)).logits for each in (whole, model))
    assert {parameter.device.index for parameter in model.parameters()} <= {1, 2}
    assert found.device == wanted.device and torch.equal(found, wanted)


def test_processes_share_a_teachers_gpus_equally(monkeypatch):
    assert [devices_of_process([4, 5, 6, 7], process, 2) for process in (0, 1)] == [[4, 5], [6, 7]]
    with pytest.raises(UserError, match=r"teacher\.devices: 2 processes cannot share 3 GPUs equally"):
        devices_of_process([2, 3, 4], 0, 2)
    with pytest.raises(UserError, match=r"teacher\.devices: GPU 1 trains a student; name others, from 2 on"):
        devices_of_process([1, 2], 0, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")  # which mpirun's processes may know alone
    with pytest.raises(UserError, match=r"teacher\.devices: 2 processes cannot share 3 GPUs equally"):
        own_devices([2, 3, 4])
    monkeypatch.delenv("WORLD_SIZE")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"teacher\.devices: GPU 3 does not exist; this machine has 0"):
            own_devices([3])


def test_a_teacher_that_does_not_fit_on_its_gpus_is_refused(inputs):
    """transformers would leave what does not fit on the disk, and say so in a warning."""
    model = load_model(inputs["teacher"], device_map="balanced", max_memory={"cpu": 200_000})
    with pytest.raises(UserError, match=r"^teacher\.devices: the teacher does not fit on them"):
        refuse_spilled(model)


def test_weights_that_are_no_numbers_are_found_in_quantised_ones_too(inputs, tmp_path):
    model = load_model(inputs["teacher"])
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "damaged")
    with pytest.raises(UserError, match=r"1 of its tensors hold NaN or infinity \(.*up_proj"):
        load_model(tmp_path / "damaged", **quantization_arguments("int8", None, torch.device("cpu")))


def test_the_plan_counts_the_quantised_weights(inputs, tmp_path):
    plans = [
        plan_run(described(inputs, tmp_path / "out", teacher=teacher), gpu="cpu")
        for teacher in ({}, *({"quantization": kind} for kind in ("int8", "bitsandbytes_4bit", "float8")))
    ]
    weights = [plan.phases[0].cost.memory["teacher weights"] for plan in plans]
    layers = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256
    outputs = 2 * 128 + 2 * 64 + 2 * 256 + 128
    assert [weights[0] - each for each in weights[1:]] == [3 * layers, 3.5 * layers, 3 * layers - 4 * outputs]
    two = save_llama(tmp_path / "two", 0, hidden_size=128, layers=2)
    teachers = [{"path": two}, {"path": two, "offload": "cpu"}, {"path": two, "devices": [1]}]
    plans = [plan_run(described(inputs, tmp_path / "out", teacher=teacher), gpu="cpu") for teacher in teachers]
    weights = [plan.phases[0].cost.memory["teacher weights"] for plan in plans]
    assert weights[0] - weights[1] == 4 * (layers + 2 * 128)  # one of two layers, with its norms
    assert weights[2] == 0


def test_what_cannot_be_is_refused(inputs, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"teacher\.quantization: the student would be converted from quantised weig"):
        RunConfig.parse(
            {
                **described(inputs, tmp_path, teacher={"quantization": "int8"}).model_dump(exclude={"model"}),
                "student": {"layout": "hybrid"},
            }
        )
    with pytest.raises(UserError, match=r"teacher\.quantization: kwargs\.load_in_4bit is given too"):
        described(inputs, tmp_path, teacher={"quantization": "int8", "kwargs": {"load_in_4bit": True}})
    with pytest.raises(UserError, match=r"teacher\.offload: quantised weights stay on the GPU"):
        described(inputs, tmp_path, teacher={"quantization": "int8", "offload": "cpu"})
    with pytest.raises(UserError, match=r"teacher\.offload: kwargs\.device_map places the layers already"):
        described(inputs, tmp_path, teacher={"offload": "cpu", "kwargs": {"device_map": "auto"}})
    with pytest.raises(UserError, match=r"teacher\.devices: offload places the layers, too"):
        described(inputs, tmp_path, teacher={"offload": "cpu", "devices": [1]})
    with pytest.raises(UserError, match=r"teacher\.devices: \[1, 1\] names a GPU twice"):
        described(inputs, tmp_path, teacher={"devices": [1, 1]})
    with pytest.raises(UserError, match=r"teacher\.quantization: is not for GGUF"):
        described(inputs, tmp_path, teacher={"quantization": "int8", "path": "a.gguf"})
    with pytest.raises(UserError, match=r"teacher\.quantization: a capture stores the outputs of the whole teacher"):
        CaptureConfig.parse(
            {
                "teacher": {"path": inputs["teacher"], "quantization": "int8"},
                "sequence_length": 64,
                "dataset": {"train_dataset": {"disk_path": inputs["text"]}},
                "compression": {"plain": {"k": 5, "vocab_size": 259}},
                "output_path": str(tmp_path),
            }
        )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = described(inputs, tmp_path, teacher={"quantization": "bitsandbytes_4bit"})
    with pytest.raises(UserError, match=r"teacher\.quantization: bitsandbytes_4bit needs bitsandbytes: pip install"):
        check_ready(resolve(config))
