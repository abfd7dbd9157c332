"""The loss of docs/adding_a_loss.md in a whole run: planned, trained, resumed and reported by its name."""

import json
import shutil
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from distillkit.config import UserError
from distillkit.planning import plan_run
from distillkit.runs.names import COMPLETE, WRITING
from tests.losses.test_from_module import block
from tests.training.test_distill import configuration, run
from tests.training.tiny import save_inputs


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """The working directory, with the module of the page."""
    (tmp_path / "my_losses.py").write_text(block("python"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_losses", None)


@pytest.fixture
def described(directory):
    names = save_inputs(directory)
    losses = yaml.safe_load(block("yaml"))["loss_functions"]
    training = {"max_steps": 4, "save_steps": 2, "logging_steps": 2}

    def of(folder, **changes):
        inputs = {**names, "student": names["teacher"]}
        changes = {"loss_functions": losses, "layer_mapping": None, "evaluation": None, **changes}
        return configuration(inputs, directory / folder, training, **changes)

    return of


def test_it_is_planned_trained_resumed_and_reported(described, directory):
    plan = plan_run(described("run"))
    assert not plan.errors
    assert plan.phases[0].losses == ["cross_entropy", "focal_kl"]

    folders = [directory / name for name in ("undisturbed", "stopped")]
    run(described("undisturbed"))
    shutil.copytree(*folders)
    # What a run leaves that was killed after step 2: its later files are gone.
    for name in ("results.json", "model.safetensors"):
        (folders[1] / name).unlink()
    (folders[1] / "checkpoint-4" / COMPLETE).rename(folders[1] / "checkpoint-4" / WRITING)
    assert "resuming after step 2" in run(described("stopped", resume=True))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    for folder in folders:
        assert "focal_kl" in json.loads((folder / "results.json").read_text())["losses"]
        assert r"0.2 cross\_entropy + 0.8 focal\_kl" in (folder / "report.md").read_text()


def test_a_loss_of_a_later_phase_is_imported_before_the_first_begins(described, directory):
    phases = [
        {"name": "first"},
        {"name": "second", "loss_functions": [{"function": "my_losses:nothing", "weight": 1}]},
    ]
    with pytest.raises(UserError, match=r"^phases\[1\].loss_functions\[0\].function: the module has no 'nothing'"):
        run(described("run", phases=phases))
    assert not (directory / "run").exists()


def test_a_loss_that_reads_values_is_planned_without_memory_and_time(described, directory):
    (directory / "my_losses.py").write_text(
        "def branching(student_logits, teacher, labels):\n"
        "    loss = student_logits.square().mean(-1)\n"
        "    return (loss if loss.max() > 3 else 2 * loss), loss.new_ones(len(loss))\n"
    )
    plan = plan_run(described("run", loss_functions=[{"function": "my_losses:branching", "weight": 1}]))
    assert not plan.errors and plan.phases[0].cost is None
    assert any(line.startswith("loss_functions: a loss reads values of its tensors") for line in plan.warnings)
