"""A checkpoint counts only when it is whole, at whatever moment the run was killed."""

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from distillkit.config import UserError
from distillkit.runs.checkpoints import (
    begin,
    complete_checkpoints,
    delete_incomplete,
    mark_complete,
    newest_whole,
    refuse_others,
    rotate,
)
from distillkit.runs.writing import read_sealed, write_sealed
from tests.damage import damage, damages


def write(folder, step, complete=True):
    path = folder / f"checkpoint-{step}"
    begun = begin(path)
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 30}))
    if complete:
        mark_complete(path, begun)
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


def test_a_folder_of_the_users_is_left_alone(tmp_path):
    mine = tmp_path / "checkpoint-mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("x")
    delete_incomplete(tmp_path)
    refuse_others(tmp_path)
    assert (mine / "notes.txt").exists()
    numbered = tmp_path / "checkpoint-7"
    mine.rename(numbered)
    delete_incomplete(tmp_path)
    with pytest.raises(
        UserError, match=r"checkpoint-7: is no checkpoint that this run wrote to its end: it lacks .*'complete'"
    ):
        refuse_others(tmp_path)
    assert (numbered / "notes.txt").exists()


def test_a_killed_deletion_is_done_again(tmp_path, monkeypatch):
    path = write(tmp_path, 10)
    (path / "inner").mkdir()

    def killed(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            rotate_away(tmp_path)
    assert path.exists() and steps(tmp_path) == [20]
    delete_incomplete(tmp_path)
    assert not path.exists()


def rotate_away(folder):
    write(folder, 20)
    rotate(folder, 1)


def test_a_damaged_newest_one_is_deleted_and_said_and_the_last_whole_one_is_used(tmp_path):
    for step in (10, 20, 30):
        path = write(tmp_path, step)
    (path / "model.safetensors").write_bytes(b"weighty")
    said = []
    assert newest_whole(tmp_path, said.append).step == 20
    assert said == [
        "checkpoint-30 is damaged (model.safetensors has other content) and deleted; checkpoint-20 is older"
    ]
    assert steps(tmp_path) == [10, 20]


def test_where_none_is_whole_nothing_is_deleted(tmp_path):
    for step in (10, 20):
        (write(tmp_path, step) / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"checkpoint-20: is damaged \(model.safetensors is missing\), and there is no"):
        newest_whole(tmp_path, print)
    assert steps(tmp_path) == [10, 20]


def test_one_of_an_earlier_version_is_used_unchecked(tmp_path):
    path = write(tmp_path, 10)
    (path / "complete").write_bytes(b"")
    (path / "model.safetensors").write_bytes(b"other")
    assert newest_whole(tmp_path, print).checked_by() == "its files are not checked: it is of an earlier version"


@given(data=strategies.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_noticed_or_changes_nothing(tmp_path, data):
    """Of a checkpoint's files, its mark and the metrics before it."""
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    metrics = folder / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 2.5}\n')
    path = write(folder, 10)
    logged = metrics.read_bytes()
    metrics.write_bytes(logged + b'{"step": 11}\n')
    names = ["model.safetensors", "trainer_state.json", "complete", "../metrics.jsonl"]
    hit = path / data.draw(strategies.sampled_from(names))
    before = hit.read_bytes()
    damage(hit, *data.draw(damages()))
    problem, restored = "", None
    try:
        restored = newest_whole(folder, print).metrics()
    except UserError as error:
        problem = str(error)
    if problem:
        assert hit.name in problem
    elif hit.name == "complete":  # an empty one is of an earlier version
        assert restored in (logged, None)
    elif hit.name == "metrics.jsonl":
        assert restored == logged
    else:
        assert hit.read_bytes() == before


@given(data=strategies.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_sealed_file_is_what_was_written_or_refused(tmp_path, data):
    path = tmp_path / "run.json"
    content = {"config": {"a": 1, "rate": 1e-3}, "rows": [1, None], "text": "x"}
    write_sealed(path, content)
    damage(path, *data.draw(damages()))
    try:
        read = read_sealed(path)
    except UserError as error:
        read, problem = content, str(error)
    else:
        problem = f"{path}: is damaged"
    assert problem.startswith(f"{path}: is damaged") and {name: read[name] for name in content} == content
