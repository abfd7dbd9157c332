"""Writing in the background: from a copy, in its turn, and whatever fails is raised by all processes, once."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore, checkpoint, destroy_process_group, init_process_group

from distillkit.config import UserError
from distillkit.config.parallel import ParallelConfig
from distillkit.training.divided_checkpoints import CheckpointWriter, _Writer, writes_in_background

NOT_WRITTEN = (
    r"^output_path: .*checkpoint-4/optimizer could not be written: .*; earlier checkpoints are whole; go on with "
    "--resume$"
)


@pytest.fixture
def alone():
    """A group of this process alone."""
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield SimpleNamespace(world_size=1, ddp_timeout=60)
    destroy_process_group()


def read(folder):
    state = {"weights": torch.zeros(3)}
    checkpoint.load(state, checkpoint_id=folder)
    return state["weights"].tolist()


def test_what_training_changes_meanwhile_is_not_written(alone, tmp_path, monkeypatch):
    weights, finished = torch.ones(3), []
    write_data = _Writer.write_data

    def late(writer, *given):
        weights.fill_(2)
        return write_data(writer, *given)

    monkeypatch.setattr(_Writer, "write_data", late)
    writer = CheckpointWriter(alone, background=True)
    for number in (1, 2):  # the second waits for the first
        writer.write(tmp_path / str(number), {"weights": weights}, lambda: finished.append(read(tmp_path / "1")))
    writer.settle()
    assert finished == [[1, 1, 1]] * 2
    assert read(tmp_path / "2") == [2, 2, 2]


@pytest.mark.parametrize("background", [False, True])
def test_a_file_that_cannot_be_written_is_one_line(alone, tmp_path, background):
    (tmp_path / "checkpoint-4").write_text("where a folder should be")
    writer, finished = CheckpointWriter(alone, background=background), []

    def write():
        writer.write(tmp_path / "checkpoint-4/optimizer", {"weights": torch.ones(3)}, lambda: finished.append(True))
        writer.wait()
        writer.poll()

    with pytest.raises(UserError, match=NOT_WRITTEN):
        write()
    writer.poll()
    writer.settle()
    assert not finished


def test_a_fault_of_what_the_main_process_does_after_that_is_raised_as_it_is(alone, tmp_path):
    writer = CheckpointWriter(alone, background=True)
    writer.write(tmp_path / "optimizer", {"weights": torch.ones(3)}, lambda: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        writer.settle()


@pytest.mark.parametrize(
    ("wanted", "device", "optim", "expected"),
    [
        ("auto", "cuda", "adamw_torch_8bit", True),
        ("auto", "cpu", "adamw_torch", False),
        (True, "cpu", "adamw_torch", True),
        (True, "cpu", "adamw_torch_8bit", False),
        (False, "cuda", "adamw_torch", False),
    ],
)
def test_where_it_is_a_gain(wanted, device, optim, expected):
    arguments = SimpleNamespace(device=torch.device(device), optim=optim)
    assert writes_in_background(ParallelConfig(async_checkpoints=wanted), arguments) is expected
    assert not writes_in_background(None, arguments)
