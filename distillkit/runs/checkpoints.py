"""Which checkpoints of a run can be gone on from.

A run can be killed at any moment, also while it writes a checkpoint or deletes an old one. So a checkpoint counts only
once it holds the file `complete`, written after everything else, and removed before anything else. An older checkpoint
is deleted only when the newer one is complete.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from distillkit.runs.names import CHECKPOINT, COMPLETE
from distillkit.runs.writing import flush


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, and the optimizer steps made until then."""

    path: Path
    step: int

    def reached_the_end(self) -> bool:
        """Whether all steps of its run were made."""
        state = json.loads((self.path / "trainer_state.json").read_text())
        return bool(state["global_step"] >= state["max_steps"])


def complete_checkpoints(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    found = [
        Checkpoint(path, int(path.name.removeprefix(CHECKPOINT)))
        for path in folder.glob(f"{CHECKPOINT}*")
        if path.name.removeprefix(CHECKPOINT).isdigit() and (path / COMPLETE).exists()
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def mark_complete(path: Path) -> None:
    """Declare a checkpoint complete, once all that it holds has reached the disk."""
    flush_files(path.rglob("*"))
    (path / COMPLETE).touch()
    flush(path)


def flush_files(paths: Iterable[Path]) -> None:
    """Wait until the files among the paths have reached the disk."""
    for path in paths:
        if path.is_file():
            flush(path)


def delete(path: Path) -> None:
    """Delete a checkpoint. Killed half-way, what is left does not count as one."""
    (path / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(path)


def delete_incomplete(folder: Path) -> None:
    """Delete what a killed run left half-written or half-deleted."""
    for path in folder.glob(f"{CHECKPOINT}*"):
        if path.is_dir() and not (path / COMPLETE).exists():
            shutil.rmtree(path)


def rotate(folder: Path, limit: int | None, best: str | None = None) -> None:
    """Delete the oldest complete checkpoints beyond `limit`; never the newest, nor the folder `best`."""
    if not limit or limit < 0:
        return
    checkpoints = complete_checkpoints(folder)
    surplus = len(checkpoints) - limit
    for checkpoint in checkpoints[:-1]:
        if surplus <= 0:
            return
        if best is None or checkpoint.path.resolve() != Path(best).resolve():
            delete(checkpoint.path)
            surplus -= 1
