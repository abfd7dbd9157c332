"""What goes on is the run that was begun, from whole files; anything else is refused by name, and nothing is lost."""

import io
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies
from rich.console import Console
from safetensors.torch import load_file, save_file

from distillkit.config import RunConfig, UserError
from distillkit.runs.lock import locked
from distillkit.training import distill, setup
from distillkit.training import phase as phase_module
from tests.damage import damage, damages
from tests.training.test_distill import configuration, run
from tests.training.tiny import save_inputs, save_llama, save_text, tokenizer

TRAINING = {"max_steps": 4, "save_steps": 1, "logging_steps": 1, "gradient_accumulation_steps": 1}


def make_inputs(folder):
    return {**save_inputs(folder), "student": save_llama(folder / "student", 1)}


def described(inputs, folder, **changes):
    return configuration(inputs, folder, TRAINING, **{"evaluation": {"num_tokens": 100}, **changes})


def killed(finished, folder):
    """A copy of a finished run or phase as it was when it was killed after its last step but one."""
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "checkpoint-4")
    for path in folder.iterdir():
        if path.is_file() and path.name not in ("run.json", "metrics.jsonl"):
            path.unlink()
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(described(inputs, folder))
    return folder


def outcome(folder):
    """All that a run tells of a student, but for the time that it took."""
    results = json.loads((folder / "results.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [
        {name: line[name] for name in ("step", "loss", "tokens", "learning_rate") if name in line} for line in lines
    ]
    return results["divergence"], results["losses"], logged


def assert_same(ours, theirs):
    mine, other = (load_file(each / "model.safetensors") for each in (ours, theirs))
    assert mine.keys() == other.keys()
    assert [name for name in mine if not torch.equal(mine[name], other[name])] == []
    assert outcome(ours) == outcome(theirs)


def other_weights(inputs):
    path = Path(inputs["teacher"]) / "model.safetensors"
    weights = {name: tensor + 1 for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def other_text(path):
    content = Path(path).read_text()
    Path(path).write_text(content.replace("0", "5"))


def other_tokenizer(inputs):
    own = tokenizer()
    own.chat_template = "{{ messages }}"
    own.save_pretrained(inputs["student"])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (other_weights, r"^teacher\.path: is not what it was when the run in .* began: .*model.safetensors has other"),
        (lambda inputs: other_text(inputs["text"]), r"^dataset\.train_dataset: is not what .*jsonl has other content"),
        (lambda inputs: save_text(Path(inputs["text"]), 39), r"^dataset\.train_dataset: is not .* bytes, not "),
        (
            lambda inputs: other_text(inputs["held_out"]),
            r"^dataset\.eval_dataset: is not what .*jsonl has other content",
        ),
        (other_tokenizer, r"^model: is not what it was when the run in .* began: its tokenizer is another"),
    ],
)
def test_what_has_changed_is_refused_by_its_key(finished, inputs, tmp_path, change, line):
    folder = killed(finished, tmp_path / "run")
    place = Path(inputs["text"]).parent
    kept = shutil.copytree(place, tmp_path / "kept")
    try:
        change(inputs)
        with pytest.raises(UserError, match=line):
            run(described(inputs, folder, resume=True))
    finally:
        shutil.rmtree(place)
        shutil.copytree(kept, place)
    assert "resuming after step 3; its files are whole" in run(described(inputs, folder, resume=True))
    assert_same(folder, finished)


def test_a_loss_that_has_changed_is_refused(inputs, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    loss = tmp_path / "a_loss_of_mine.py"
    loss.write_text("from distillkit.losses.divergences import kl as mine\n")
    changes = {"loss_functions": [{"function": "a_loss_of_mine:mine", "weight": 1.0}], "layer_mapping": None}
    folder = tmp_path / "run"
    run(described(inputs, folder, **changes))
    killed(folder, tmp_path / "again")
    loss.write_text("from distillkit.losses.divergences import reverse_kl as mine\n")
    with pytest.raises(UserError, match=r"^loss_functions\[0\]\.function: is not what it was .*a_loss_of_mine.py has"):
        run(described(inputs, tmp_path / "again", resume=True, **changes))


def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_ends_in_the_same_student(finished, inputs, tmp_path):
    folder = killed(finished, tmp_path / "run")
    shutil.copytree(finished / "checkpoint-4", folder / "checkpoint-4")
    optimizer = folder / "checkpoint-4" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    (folder / "checkpoint-mine").mkdir()
    (folder / "checkpoint-mine" / "notes.txt").write_text("x")
    said = run(described(inputs, folder, resume=True))
    assert "checkpoint-4 is damaged (optimizer.pt has " in said and "resuming after step 3" in said
    assert_same(folder, finished)
    assert (folder / "checkpoint-mine" / "notes.txt").exists()


@given(data=strategies.data())
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_with_any_damaged_file_a_run_ends_as_it_would_have_or_names_it(finished, inputs, tmp_path, data):
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    killed(finished, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hit = data.draw(strategies.sampled_from(files), label="file")
    damage(hit, *data.draw(damages(), label="damage"))
    problem = ""
    try:
        run(described(inputs, folder, resume=True))
    except UserError as error:
        problem = str(error)
    if problem:
        assert hit.name in problem
    else:
        assert_same(folder, finished)


def in_phases(inputs, folder, **changes):
    phases = [{"name": "one", "training_args": {"max_steps": 1}}, {"name": "two"}]
    return described(inputs, folder, phases=phases, **changes)


def test_a_later_phase_finds_what_the_one_before_left_and_learnt_from(inputs, tmp_path):
    folder = tmp_path / "run"
    own = make_inputs(tmp_path / "own")
    run(in_phases(own, folder))
    shutil.rmtree(folder / "phases" / "2-two")
    for path in folder.iterdir():
        if path.is_file() and path.name != "run.json":
            path.unlink()
    weights = folder / "phases" / "1-one" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-4] + b"\0\0\0\0")
    with pytest.raises(UserError, match=r"phases/1-one: is not as it was .*: model.safetensors has other content"):
        run(in_phases(own, folder, resume=True))
    weights.write_bytes(kept)
    other_weights(own)
    with pytest.raises(UserError, match=r"^teacher\.path: is not what it was when the run in .* began"):
        run(in_phases(own, folder, resume=True))


def test_a_later_phase_may_read_a_part_of_the_text_of_the_one_before(inputs, tmp_path):
    (tmp_path / "text").mkdir()
    for name in ("a", "b"):
        save_text(tmp_path / "text" / f"{name}.jsonl")
    dataset = {"train_dataset": {"disk_path": str(tmp_path / "text")}}
    phases = in_phases(inputs, tmp_path / "run").model_dump(exclude_unset=True)["phases"]
    phases[1]["dataset"] = {"train_dataset": {"disk_path": str(tmp_path / "text" / "b*.jsonl")}}
    run(described(inputs, tmp_path / "run", dataset=dataset, evaluation=None, phases=phases))
    assert (tmp_path / "run" / "phases" / "2-two" / "results.json").exists()


def test_a_teacher_without_a_configuration_is_named(inputs, tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"^teacher\.path: .* is damaged"):
        run(described(inputs, tmp_path / "run", teacher={"kind": "hf", "path": str(tmp_path / "teacher")}))


def test_the_untrained_student_is_that_of_the_teacher_as_it_is_now(tmp_path):
    inputs, folder = make_inputs(tmp_path), tmp_path / "run"
    untrained, name = folder / "untrained" / "model.safetensors", "model.embed_tokens.weight"
    asked = {"model": None, "student": {"layout": "hybrid"}, "frozen_res": ["nothing"], "layer_mapping": "all"}
    refused = pytest.raises(UserError, match=r"frozen_res\[0\]")
    with refused:
        run(described(inputs, folder, **asked))
    first = untrained.read_bytes()
    untrained.write_bytes(first[:-4] + b"\0\0\0\0")
    with refused:
        run(described(inputs, folder, **asked))
    assert untrained.read_bytes() == first
    other_weights(inputs)
    with refused:
        run(described(inputs, folder, **asked))
    teachers = load_file(Path(inputs["teacher"]) / "model.safetensors")[name]
    assert torch.equal(load_file(untrained)[name], teachers)


def test_a_folder_in_use_is_not_touched(finished, inputs, tmp_path):
    folder = killed(finished, tmp_path / "run")
    with locked(folder):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        for resume in (False, True):
            with pytest.raises(UserError, match=r"^output_path: another process works in "):
                run(described(inputs, folder, resume=resume))
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "untrained", "_prepared"])
def test_files_of_others_are_not_overwritten(inputs, tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"^output_path: .* holds {name}, which is not of a run of distillkit"):
        run(described(inputs, tmp_path, resume=True))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_sigterm_while_models_are_loaded_ends_the_run_in_one_line(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "_load_teacher", lambda *given: os.kill(os.getpid(), signal.SIGTERM))
    said = io.StringIO()
    with pytest.raises(SystemExit) as exit_code:
        distill(described(inputs, tmp_path / "run"), Console(file=said, width=200))
    assert exit_code.value.code == 130
    assert said.getvalue().endswith("interrupted; go on with --resume\n")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_room_for_checkpoints_and_student_is_checked_before_training(inputs, tmp_path, monkeypatch):
    little = type("", (), {"free": 200_000})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: little)
        with pytest.raises(
            UserError, match=r"^output_path: has no room: 0 MiB are free at .* but 3 more checkpoints of "
        ):
            run(described(inputs, tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    run(described(inputs, tmp_path / "run"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 417920 vs 417812"),
    ],
)
def test_a_disk_that_is_full_later_is_one_line_and_the_run_goes_on(finished, inputs, tmp_path, monkeypatch, error):
    save, calls = torch.save, []

    def failing(*given, **named):
        calls.append(given)
        if len(calls) > 4:
            raise error
        save(*given, **named)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", failing)
        with pytest.raises(UserError, match=r"^output_path: the disk is full at .*; free some space, and go on with"):
            run(described(inputs, folder))
    run(described(inputs, folder, resume=True))
    assert_same(folder, finished)


def test_what_fails_at_the_end_costs_no_results(finished, inputs, tmp_path, monkeypatch):
    def fails(*given, **named):
        raise RuntimeError("no\nway")

    monkeypatch.setattr(phase_module, "generate_samples", fails)
    monkeypatch.setattr("distillkit.reporting.report.write_model_card", fails)
    said = run(described(inputs, tmp_path / "run"))
    assert "there are no samples: RuntimeError: no way\n" in said and "no report was written" in said
    assert_same(tmp_path / "run", finished)


def test_secrets_are_in_no_file_of_a_run(inputs, tmp_path, monkeypatch):
    """By key and by shape, of kwargs, the command line and the environment."""
    shaped, plain = "hf_" + "aBcDeFgHiJ" * 3, "plain-words-9"
    monkeypatch.setenv("MY_SERVICE_TOKEN", plain)
    monkeypatch.setattr("sys.argv", ["distillkit", "run.yaml", "teacher.kwargs.token=hf_key", f"project_name={plain}"])
    folder = tmp_path / "run"
    teacher = {"kind": "hf", "path": inputs["teacher"], "kwargs": {"token": "hf_key"}}
    config = in_phases(inputs, folder, teacher=teacher, project_name=f"{shaped} {plain}")
    run(RunConfig.parse(config.model_dump(exclude_unset=True)))
    found = [
        path
        for path in folder.rglob("*")
        if path.is_file()
        for content in [path.read_bytes()]
        if any(secret.encode() in content for secret in ("hf_key", shaped, plain))
    ]
    assert found == []
    assert "--resume" not in run(in_phases(inputs, folder, teacher=teacher, project_name="other", resume=True))
