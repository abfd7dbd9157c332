"""Phases: each is the run that it would be by itself, and nothing but its folder passes from one to the next."""

import io
import json
import os
import shutil
import signal
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillkit.config import RunConfig, UserError, resolve
from distillkit.training import distill, setup
from tests.training.tiny import BYTES, save_inputs

NAMES = ["alignment", "distillation", "long"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_inputs(tmp_path_factory.mktemp("inputs"))


def description(inputs, folder, training=None, phases=None, **changes):
    """Three phases in three precisions, lengths and numbers of micro-batches."""
    return {
        "student": {"full_attention_layers": [1]},
        "teacher": {"kind": "hf", "path": inputs["teacher"]},
        "output_path": str(folder),
        "project_name": "tiny",
        "sequence_length": 64,
        "dataset": {
            "train_dataset": {"disk_path": inputs["text"]},
            "eval_dataset": {"disk_path": inputs["held_out"]},
        },
        "evaluation": {"num_tokens": 200},
        "layer_mapping": "all",
        "training_args": {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "use_cpu": True,
            **(training or {}),
        },
        "phases": phases
        or [
            {
                "name": "alignment",
                "frozen_res": ["mlp", "embed_tokens", "norm"],
                "loss_functions": [{"function": "hs_cosine", "weight": 1.0}],
                "training_args": {"bf16": True, "learning_rate": 1e-5},
            },
            {"name": "distillation", "training_args": {"gradient_accumulation_steps": 2, "bf16": True}},
            {"name": "long", "sequence_length": 128, "tokens": 1000},
        ],
        **changes,
    }


def configuration(inputs, folder, training=None, phases=None, **changes):
    return RunConfig.parse(description(inputs, folder, training, phases, **changes))


def run(config):
    """What the run says, off a terminal."""
    said = io.StringIO()
    distill(config, Console(file=said, width=200))
    return said.getvalue()


def phase_folders(folder):
    return [folder / "phases" / f"{index + 1}-{name}" for index, name in enumerate(NAMES)]


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A finished run, what it said, and which of the models loaded before were still there as each was loaded."""
    folder, loaded, left = tmp_path_factory.mktemp("finished") / "run", [], []

    load = setup._open

    def load_and_note(*given, **options):
        left.append([each() is not None for each in loaded])
        model, stored = load(*given, **options)
        loaded.append(weakref.ref(model))
        return model, stored

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "_open", load_and_note)
        said = run(configuration(inputs, folder))
    return folder, said, left


def test_each_phase_is_the_run_that_it_is_by_itself(finished, inputs, tmp_path):
    """No seed, precision or other state of one phase reaches the next."""
    folder, _, _ = finished
    by_hand = configuration(inputs, tmp_path / "run")
    for phase, done in zip(resolve(by_hand).phases, phase_folders(folder), strict=True):
        run(phase.config)
        saved = Path(phase.config.output_path)
        ours, theirs = weights(saved), weights(done)
        assert_equal(ours, {name: tensor.to(ours[name].dtype) for name, tensor in theirs.items()})
        shutil.copy(done / "model.safetensors", saved)  # a run by itself does not keep its masters


def test_students_between_phases_keep_what_bf16_would_lose_and_declare_bf16(finished):
    folder, _, _ = finished
    first = phase_folders(folder)[0]
    trained = weights(first)["model.layers.0.self_attn.q_proj.weight"]
    assert trained.dtype == torch.float32
    assert not torch.equal(trained, trained.bfloat16().float())
    assert AutoModelForCausalLM.from_pretrained(first).dtype == torch.bfloat16


def test_the_whole_is_a_student_with_the_results_of_all(finished, inputs):
    folder, _, _ = finished
    assert_equal(weights(folder), weights(phase_folders(folder)[-1]))
    assert (folder / "model.safetensors").samefile(phase_folders(folder)[-1] / "model.safetensors")
    student = AutoModelForCausalLM.from_pretrained(folder)
    assert student.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(folder)("1 2").input_ids
    results = json.loads((folder / "results.json").read_text())
    parts = [json.loads((each / "results.json").read_text()) for each in phase_folders(folder)]
    assert [phase["name"] for phase in results["phases"]] == NAMES
    assert [phase["folder"] for phase in results["phases"]] == [f"phases/{each.name}" for each in phase_folders(folder)]
    assert [phase["sequence_length"] for phase in results["phases"]] == [64, 64, 128]
    assert results["phases"][0]["loss_functions"] == ["hs_cosine"]
    assert [phase["steps"] for phase in results["phases"]][:2] == [4, 4]
    assert results["training"]["step"] == sum(part["training"]["step"] for part in parts)
    assert results["training"]["tokens"] == sum(phase["tokens"] for phase in results["phases"])
    assert results["divergence"] == {"after": parts[2]["divergence"]["after"]}  # before was in rows of another length
    one, two = parts[0]["divergence"]["after"], parts[1]["divergence"]["before"]
    assert two["kl"] == pytest.approx(one["kl"], rel=1e-3)  # of the same text; what was frozen trains now, in float32
    assert results["losses"] == parts[2]["losses"]
    assert [each["seeds"]["data"] for each in (*parts, results)] == [42, 43, 44, 42]  # of the whole as it was given
    assert results["config"]["phases"][2]["tokens"] == 1000


def test_phases_say_where_they_are_and_for_how_long(finished):
    _, said, _ = finished
    lines = said.splitlines()
    assert "phase 1 of 3: alignment" in lines
    steps = [line for line in lines if line.startswith("phase 2 of 3: distillation (")]
    assert len(steps) == 1 and "4 steps, " in steps[0] and "times through the data)" in steps[0]
    assert any("before, rows of 64" in line and "after long, rows of 128" in line for line in lines)
    assert "3 phases: " in said


def test_the_time_of_the_phases_is_that_of_the_run(finished):
    folder, said, _ = finished
    parts = [json.loads((each / "results.json").read_text())["clock"]["total"] for each in phase_folders(folder)]
    whole = json.loads((folder / "results.json").read_text())["clock"]["total"]
    assert whole - 5 < sum(parts) <= whole + 0.1  # the last one's report comes after its results
    assert [line.partition(":")[0] for line in said.splitlines() if line.startswith("time")] == [
        *(f"time of {name}" for name in NAMES),
        "time",
    ]


def test_what_a_phase_held_is_gone_when_the_next_one_loads(finished):
    assert finished[2] == [[], [True], [False] * 2, [False] * 2 + [True], [False] * 4, [False] * 4 + [True]]


def test_run_files_say_what_each_phase_came_from(finished, inputs):
    folder, _, _ = finished
    whole = json.loads((folder / "run.json").read_text())
    assert {"started", "command", "versions", "commit", "config"} <= whole.keys()
    first, second, _ = (json.loads((each / "run.json").read_text())["origins"] for each in phase_folders(folder))
    assert first["teacher"]["path"] == inputs["teacher"]
    assert first["teacher"] == second["teacher"]
    assert len(first["teacher"]["weights_sha256"]) == 64
    assert first["student"]["path"].endswith("1-alignment/untrained")
    assert second["student"]["path"].endswith("phases/1-alignment")
    files = first["data"]["dataset.train_dataset"]["files"]
    assert files == {inputs["text"]: os.path.getsize(inputs["text"])}


def test_a_folder_with_phases_is_not_overwritten(finished, inputs, tmp_path):
    folder, _, _ = finished
    with pytest.raises(UserError, match=r"output_path: .* holds a run already \(results.json, .*pass --resume"):
        run(configuration(inputs, folder))
    half = until(folder, tmp_path / "half", 2)
    with pytest.raises(UserError, match=r"holds a run already \(phases/1-alignment\)"):
        run(configuration(inputs, half))
    for resume in (False, True):
        with pytest.raises(UserError, match="holds a run already" if not resume else r"^phases\[0\]\.name: is nothing"):
            run(RunConfig.parse({**description(inputs, half, resume=resume), "phases": []}))


def until(folder, copy, phase):
    """A copy of a run as it was when it was killed before phase number `phase` had begun."""
    shutil.copytree(folder, copy)
    for path in [*phase_folders(copy)[phase - 1 :]]:
        shutil.rmtree(path)
    for path in copy.iterdir():
        if path.is_file() and path.name != "run.json":
            path.unlink()
    return copy


def test_resuming_a_finished_run_does_nothing(finished, inputs):
    folder, _, _ = finished
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert "finished already" in run(configuration(inputs, folder, {"logging_steps": 3}, resume=True))
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_killed_between_phases_it_goes_on_also_elsewhere(finished, inputs, tmp_path):
    """In a folder that was moved, too."""
    folder, _, _ = finished
    moved = until(folder, tmp_path / "moved", 3)
    said = run(configuration(inputs, moved, resume=True))
    assert "phase 1 of 3: alignment is finished already" in said
    assert "no checkpoint" not in said
    assert_equal(weights(moved), weights(folder))


def test_killed_while_the_whole_was_put_together(finished, inputs, tmp_path):
    folder, _, _ = finished
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "results.json").unlink()
    (copy / "config.json").unlink()
    (copy / ".model.safetensors.linked").write_bytes(b"half")
    said = run(configuration(inputs, copy, resume=True))
    assert "step 1/" not in said
    assert_equal(weights(copy), weights(folder))
    AutoModelForCausalLM.from_pretrained(copy)
    ours, theirs = (json.loads((each / "results.json").read_text()) for each in (copy, folder))
    assert ours["phases"] == theirs["phases"]
    assert not list(copy.glob(".*linked"))


def changed(inputs, folder, phases=None, **changes):
    """The run with other keys in its phases, by number, to be resumed."""
    described = description(inputs, folder, resume=True, **changes)
    for index, keys in (phases or {}).items():
        described["phases"][index] |= keys
    return RunConfig.parse(described)


@pytest.mark.parametrize(
    ("phases", "changes", "message"),
    [
        (
            {0: {"layer_mapping": [[0, 0]]}},
            {},
            r"^phases\[0\]\.layer_mapping\[0\]\[0\]: is 0, but .* without it; remove it",
        ),
        ({0: {"sequence_length": 32}}, {}, r"^phases\[0\]\.sequence_length: is 32, but .* was started with 64"),
        ({0: {"name": "other"}}, {}, r"^phases\[0\]\.name: is 'other', but .* was started with 'alignment'"),
        ({}, {"trust_remote_code": True}, r"^trust_remote_code: is true, but"),
        ({1: {"training_args": {"max_steps": 3}}}, {}, r"^phases\[1\]\.training_args\.max_steps: is 3, but .* with 4"),
    ],
)
def test_what_has_begun_is_resumed_only_as_it_was(finished, inputs, tmp_path, phases, changes, message):
    copy = until(finished[0], tmp_path / "copy", 3)
    with pytest.raises(UserError, match=message):
        run(changed(inputs, copy, phases, **changes))


def test_a_phase_that_has_not_begun_may_be_changed(finished, inputs, tmp_path):
    copy = until(finished[0], tmp_path / "copy", 3)
    said = run(changed(inputs, copy, {2: {"tokens": 2500, "name": "longer"}}))
    assert "phase 3 of 3: longer (" in said
    record = json.loads((copy / "run.json").read_text())
    assert record["config"]["phases"][2]["name"] == "longer"
    assert [resumed.keys() for resumed in record["resumed"]] == [{"started", "command", "versions", "commit"}]
    assert json.loads((copy / "results.json").read_text())["phases"][2]["tokens"] > 2000


def test_fewer_phases_than_have_begun_are_refused(finished, inputs, tmp_path):
    copy = until(finished[0], tmp_path / "copy", 3)
    described = description(inputs, copy, resume=True)
    del described["phases"][1:]
    with pytest.raises(UserError, match=r"^phases: are 1, but 2 have begun in "):
        run(RunConfig.parse(described))


def test_a_student_that_is_saved_as_the_last_is_not_gone_on_from(finished, inputs, tmp_path):
    """Its masters are gone; and one that was to be gone on from still has them."""
    described = description(inputs, finished[0], resume=True)
    described["phases"].append({"name": "more"})
    with pytest.raises(UserError, match=r"^phases: are 4, but .* was started with 3, and its student of 3-long"):
        run(RunConfig.parse(described))
    copy = until(finished[0], tmp_path / "copy", 3)
    described = description(inputs, copy, resume=True)
    del described["phases"][2]
    with pytest.raises(UserError, match=r"^phases: are 2, but .* was started with 3"):
        run(RunConfig.parse(described))


def test_training_arguments_of_a_later_phase_are_refused_before_the_first_begins(inputs, tmp_path):
    phases = [{"name": "one"}, {"name": "two", "training_args": {"report_to": "nowhere"}}]
    with pytest.raises(UserError, match=r"^phases\[1\]\.training_args\.report_to: 'nowhere' is not installed"):
        run(configuration(inputs, tmp_path / "run", phases=phases))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("index", [0, 1])
def test_a_pattern_without_match_is_told_before_anything_is_trained(inputs, tmp_path, index):
    phases = [{"name": "one"}, {"name": "two"}]
    phases[index]["frozen_res"] = ["norm", "nothing"]
    with pytest.raises(UserError, match=rf"^phases\[{index}\]\.frozen_res\[1\]: 'nothing' matches no parameter"):
        run(configuration(inputs, tmp_path / "run", phases=phases))
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize("lines", [2, 4])
def test_a_signal_ends_the_run_and_it_goes_on_in_the_same_phase_or_the_next(finished, inputs, tmp_path, lines):
    """Also one that comes during the last step of a phase."""
    config = configuration(inputs, tmp_path / "run", {"save_steps": 100})
    metrics = phase_folders(tmp_path / "run")[1] / "metrics.jsonl"

    def interrupt():
        while not metrics.exists() or metrics.read_text().count("\n") < lines:
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGINT)

    said = io.StringIO()
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SystemExit) as exit_code:
        distill(config, Console(file=said, width=200))
    assert exit_code.value.code == 130
    assert said.getvalue().endswith("go on with --resume\n")
    run(configuration(inputs, tmp_path / "run", {"save_steps": 100}, resume=True))
    assert_equal(weights(tmp_path / "run"), weights(finished[0]))


def test_ctrl_c_while_models_are_loaded_ends_the_run_in_one_line(inputs, tmp_path, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, "_load_teacher", interrupted)
    said = io.StringIO()
    with pytest.raises(SystemExit) as exit_code:
        distill(configuration(inputs, tmp_path / "run"), Console(file=said, width=200))
    assert exit_code.value.code == 130
    assert said.getvalue().endswith("interrupted; go on with --resume\n")


def test_rows_added_to_embeddings_mean_no_token_in_any_phase(inputs, tmp_path):
    phases = [{"name": "one"}, {"name": "two"}]
    grown = {"resize_embeddings_to_multiple_of": 64, "evaluation": None}
    run(configuration(inputs, tmp_path / "run", {"max_steps": 2, "weight_decay": 0.5}, phases=phases, **grown))
    embeddings = weights(tmp_path / "run")["model.embed_tokens.weight"]
    torch.testing.assert_close(embeddings[BYTES:], embeddings[:BYTES].mean(0).expand(61, -1))
