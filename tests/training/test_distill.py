"""A whole run, from a configuration to a student that loads, with what it says on the way."""

import io
import json
import os
import shutil
import signal
import threading
import time

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillkit.config import RunConfig, UserError
from distillkit.training import distill
from tests.training.tiny import BYTES, save_llama, save_text

TRAINING = {
    "max_steps": 12,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-3,
    "logging_steps": 4,
    "save_steps": 5,
    "use_cpu": True,
}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "teacher": save_llama(folder / "teacher", 0),
        "student": save_llama(folder / "student", 1, attention_dropout=0.1),
        "text": save_text(folder / "train.jsonl"),
        "held_out": save_text(folder / "valid.jsonl", documents=30),
    }


def configuration(inputs, folder, training=None, **changes):
    return RunConfig.parse(
        {
            "model": inputs["student"],
            "teacher": {"kind": "hf", "path": inputs["teacher"]},
            "output_path": str(folder),
            "sequence_length": 64,
            "dataset": {
                "train_dataset": {"disk_path": inputs["text"]},
                "eval_dataset": {"disk_path": inputs["held_out"]},
            },
            "loss_functions": [
                {"function": "cross_entropy", "weight": 0.2},
                {"function": "kl", "weight": 0.4, "temperature": 2.0},
                {"function": "hs_cosine", "weight": 0.4},
            ],
            "layer_mapping": "all",
            "frozen_res": ["embed_tokens", r"norm\.weight"],
            "evaluation": {"num_tokens": 500, "prompts": ["12 24"], "max_new_tokens": 8},
            "training_args": {**TRAINING, **(training or {})},
            **changes,
        }
    )


def run(config):
    """What the run says, off a terminal."""
    said = io.StringIO()
    distill(config, Console(file=said, width=200))
    return said.getvalue()


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, run(configuration(inputs, folder))


def test_the_student_is_closer_to_the_teacher_and_both_numbers_are_said(finished):
    folder, said = finished
    results = json.loads((folder / "results.json").read_text())
    before, after = (results["divergence"][name] for name in ("before", "after"))
    assert after["kl"] < 0.95 * before["kl"]
    assert before["tokens"] == after["tokens"] == 500
    assert f"{before['kl']:.4f}" in said
    assert f"{after['kl']:.4f}" in said
    assert results["training"]["step"] == 12
    assert results["samples"][0]["prompt"] == "12 24"
    assert len(results["samples"][0]["continuation"]) > 0
    assert {"python", "torch", "transformers"} <= results["versions"].keys()
    assert results["config"]["sequence_length"] == 64


def test_it_says_where_its_time_went(finished):
    """Without the report, which is written from the results."""
    folder, said = finished
    clock = json.loads((folder / "results.json").read_text())["clock"]
    total, *parts = clock.values()
    assert sum(parts) == pytest.approx(total, abs=0.1)
    assert {"loading models", "tokenising", "first steps", "steps", "evaluation", "checkpoints", "saving"} <= set(clock)
    (line,) = [line for line in said.splitlines() if line.startswith("time: ")]
    assert float(line.removeprefix("time: ").partition(" s: ")[0]) >= round(total, 1)
    assert ", steps " in line
    assert "Time of the command that finished it: " in (folder / "report.md").read_text()


def test_the_student_loads_with_its_tokenizer_and_is_the_one_that_was_measured(finished, inputs):
    folder, _ = finished
    student = AutoModelForCausalLM.from_pretrained(folder)
    assert student.dtype == torch.float32
    assert (
        AutoTokenizer.from_pretrained(folder)("1 2").input_ids
        == AutoTokenizer.from_pretrained(inputs["teacher"])("1 2").input_ids
    )
    untrained = AutoModelForCausalLM.from_pretrained(inputs["student"])
    same = {name for name, tensor in untrained.state_dict().items() if torch.equal(tensor, student.state_dict()[name])}
    assert same == {name for name in untrained.state_dict() if "embed" in name or "lm_head" in name or "norm" in name}


def test_every_logged_line_is_said_and_kept(finished):
    folder, said = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 4, 8, 12]
    assert all(name in lines[0] for name in ("loss", "cross_entropy", "kl", "hs_cosine", "tokens", "tokens_per_second"))
    assert [line for line in said.splitlines() if line.startswith("step ")][1].startswith("step 4/12  ")
    assert all(word in said for word in ("tokens/s", "lr ", "left 0:00:"))


def test_precision_is_said_in_one_line_and_bf16_students_are_saved_as_bf16(inputs, tmp_path):
    said = run(configuration(inputs, tmp_path / "run", {"bf16": True, "max_steps": 2}))
    assert "train as float32 master weights under bfloat16 autocast" in said
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("wanted", [True, False])
def test_sdpa_is_for_teacher_and_student(inputs, tmp_path, monkeypatch, wanted):
    """Where the exchange of SDPA is possible at all, which is on CUDA: here it is only noted."""
    exchanged = []
    monkeypatch.setattr("distillkit.training.setup.use_varlen_attention", lambda model, _: exchanged.append(model))
    run(configuration(inputs, tmp_path, {"max_steps": 1}, evaluation=None, use_flash_attention=wanted))
    assert len(exchanged) == (2 if wanted else 0)


def test_a_converted_student_learns_and_its_conversion_is_done_once(inputs, tmp_path):
    teacher = {"kind": "hf", "path": save_llama(tmp_path / "teacher", 2, layers=4)}
    folder, training = tmp_path / "run", {"bf16": True, "gradient_checkpointing": True, "max_steps": 4}
    asked = {"model": None, "student": {"layout": "hybrid"}, "teacher": teacher}
    with pytest.raises(UserError, match=r"frozen_res\[0\]: 'nothing' matches no parameter"):
        run(configuration(inputs, folder, training, **{**asked, "frozen_res": ["nothing"]}))
    converted = (folder / "untrained" / "model.safetensors").stat().st_mtime_ns
    run(configuration(inputs, folder, training, **asked))
    assert (folder / "untrained" / "model.safetensors").stat().st_mtime_ns == converted
    student = AutoModelForCausalLM.from_pretrained(folder)
    assert type(student).__name__ == "KDAHybridForCausalLM"
    assert student.config.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    untrained = AutoModelForCausalLM.from_pretrained(folder / "untrained", dtype=torch.bfloat16)
    gates = "model.layers.0.self_attn.A_log"
    assert not torch.equal(student.get_parameter(gates), untrained.get_parameter(gates))


@pytest.mark.parametrize(("capability", "warned"), [("AVX2", True), ("AVX512", False)])
def test_a_cpu_on_which_bfloat16_is_slow_is_named(inputs, tmp_path, monkeypatch, capability, warned):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    said = run(configuration(inputs, tmp_path / "run", {"bf16": True, "max_steps": 1}))
    assert ("training_args.bf16: this CPU has no AVX-512, so bfloat16 is several times slower" in said) == warned


def test_another_conversion_takes_the_place_of_an_untrained_one(inputs, tmp_path):
    folder, refused = tmp_path / "run", {"model": None, "frozen_res": ["nothing"]}
    for layers in ([0], [0, 1]):
        with pytest.raises(UserError, match="frozen_res"):
            run(configuration(inputs, folder, **refused, student={"full_attention_layers": layers}))
        untrained = AutoModelForCausalLM.from_pretrained(folder / "untrained")
        assert untrained.config.layer_types.count("full_attention") == len(layers)


def test_a_folder_with_a_run_is_not_overwritten(finished, inputs):
    folder, _ = finished
    with pytest.raises(UserError, match=r"output_path: .* holds a run already \(checkpoint-12.*pass --resume"):
        run(configuration(inputs, folder))


def test_a_folder_with_something_else_is_left_alone(inputs, tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    for resume in (False, True):
        with pytest.raises(UserError, match="checkpoint-7, which is not of a run of distillkit"):
            run(configuration(inputs, tmp_path, resume=resume))
    assert (tmp_path / "checkpoint-7").exists()


def test_resuming_a_finished_run_does_nothing(finished, inputs):
    folder, _ = finished
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert "finished already" in run(configuration(inputs, folder, resume=True))
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_resuming_nothing_starts_from_the_beginning(inputs, tmp_path):
    said = run(configuration(inputs, tmp_path / "run", {"max_steps": 1}, resume=True))
    assert "no checkpoint to resume from, the run starts from the beginning" in said
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize(
    ("training", "changes", "key"),
    [
        ({"learning_rate": 1e-3}, {}, r"training_args\.learning_rate: is 0\.001, but .* 0\.005"),
        ({}, {"sequence_length": 32}, "sequence_length"),
        ({}, {"loss_functions": [{"function": "kl", "weight": 1.0}]}, r"loss_functions\[0\]\.function"),
        ({}, {"frozen_res": ["embed_tokens"]}, r"frozen_res\[1\]"),
    ],
)
def test_a_run_is_resumed_only_as_it_was_started(finished, inputs, training, changes, key):
    folder, _ = finished
    with pytest.raises(UserError, match=f"^{key}"):
        run(configuration(inputs, folder, training, resume=True, **changes))


def begun_by_another_version(finished, folder, change):
    """A folder like that of the finished run, whose configuration as it was written then is changed."""
    described = json.loads((finished[0] / "run.json").read_text())
    change(described["config"])
    del described["checksum"]
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(described))
    (folder / "results.json").write_text(json.dumps({"config": described["config"]}))
    return folder


def test_a_run_begun_before_a_key_was_there_had_its_default(finished, inputs, tmp_path):
    def before_two_keys(config):
        del config["force_hidden_state_projection"], config["dataset"]["packing"]

    folder = begun_by_another_version(finished, tmp_path / "run", before_two_keys)
    assert "finished already" in run(configuration(inputs, folder, resume=True))
    with pytest.raises(UserError, match=r"^force_hidden_state_projection: is true, but .* was started with false"):
        run(configuration(inputs, folder, resume=True, force_hidden_state_projection=True))


def test_a_run_begun_with_a_key_that_is_gone_is_not_resumed(finished, inputs, tmp_path):
    folder = begun_by_another_version(finished, tmp_path / "run", lambda config: config.update(forgotten=1))
    with pytest.raises(UserError, match=r"^forgotten: is (empty|nothing), but .* was started with 1"):
        run(configuration(inputs, folder, resume=True))


def test_what_does_not_touch_the_weights_may_change(finished, inputs):
    folder, _ = finished
    changed = configuration(inputs, folder, {"logging_steps": 1, "save_steps": 2}, resume=True, project_name="other")
    assert "finished already" in run(changed)


def test_the_divergence_can_be_followed_during_training(inputs, tmp_path):
    said = run(configuration(inputs, tmp_path / "run", {"eval_strategy": "steps", "eval_steps": 4, "max_steps": 8}))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_kl" in line] == [4, 8]
    assert "eval_kl " in said


def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(inputs, tmp_path):
    config = configuration(inputs, tmp_path / "run", {"max_steps": 10_000, "logging_steps": 1})
    metrics = tmp_path / "run" / "metrics.jsonl"

    def interrupt():
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    said = io.StringIO()
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SystemExit) as exit_code:
        distill(config, Console(file=said, width=200))
    assert exit_code.value.code == 130
    step = int(said.getvalue().split("interrupted after step ")[1].split(",")[0])
    assert said.getvalue().endswith("saved; go on with --resume\n")
    assert (tmp_path / "run" / f"checkpoint-{step}" / "complete").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_padding_token_that_the_embeddings_have_no_row_for_is_not_used(inputs, tmp_path):
    """As a tokenizer has one that was given a <pad> by itself."""
    folders = {name: shutil.copytree(inputs[name], tmp_path / name) for name in ("teacher", "student")}
    for folder in folders.values():
        more = AutoTokenizer.from_pretrained(folder)
        more.add_special_tokens({"pad_token": "<padding>"})
        assert more.pad_token_id == BYTES
        more.save_pretrained(folder)
    given = {**inputs, **{name: str(folder) for name, folder in folders.items()}}
    run(
        configuration(
            given,
            tmp_path / "run",
            {"max_steps": 1},
            dataset={"train_dataset": {"disk_path": inputs["text"]}, "packing": False},
            evaluation=None,
        )
    )
