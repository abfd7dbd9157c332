"""A checkpoint counts only when it is whole, at whatever moment the run was killed."""

import json

import pytest

from distillkit.runs.checkpoints import begin, complete_checkpoints, delete_incomplete, mark_complete, rotate


def write(folder, step, complete=True):
    path = folder / f"checkpoint-{step}"
    begin(path)
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 30}))
    if complete:
        mark_complete(path)
    return path


def steps(folder):
    return [checkpoint.step for checkpoint in complete_checkpoints(folder)]


def test_only_complete_ones_count_in_the_order_of_their_steps(tmp_path):
    for step, complete in [(9, True), (10, True), (20, False)]:
        write(tmp_path, step, complete)
    (tmp_path / "checkpoint-final").mkdir()
    assert steps(tmp_path) == [9, 10]


def test_what_a_killed_run_left_is_deleted(tmp_path):
    write(tmp_path, 10)
    broken = write(tmp_path, 20, complete=False)
    delete_incomplete(tmp_path)
    assert not broken.exists()
    assert steps(tmp_path) == [10]


def test_rotation_keeps_the_newest_and_never_counts_on_an_incomplete_one(tmp_path):
    for step in (10, 20, 30):
        write(tmp_path, step)
    write(tmp_path, 40, complete=False)
    rotate(tmp_path, 2)
    assert steps(tmp_path) == [20, 30]
    rotate(tmp_path, 1)
    assert steps(tmp_path) == [30]


@pytest.mark.parametrize("limit", [None, 0, -1])
def test_no_limit_deletes_nothing(tmp_path, limit):
    for step in (10, 20):
        write(tmp_path, step)
    rotate(tmp_path, limit)
    assert steps(tmp_path) == [10, 20]


def test_rotation_spares_the_best(tmp_path):
    for step in (10, 20, 30):
        write(tmp_path, step)
    rotate(tmp_path, 2, best=str(tmp_path / "checkpoint-10"))
    assert steps(tmp_path) == [10, 30]


def test_a_checkpoint_knows_whether_its_run_was_through(tmp_path):
    write(tmp_path, 20)
    write(tmp_path, 30)
    assert [checkpoint.reached_the_end() for checkpoint in complete_checkpoints(tmp_path)] == [False, True]
