"""Which checkpoints a run can resume from.

A run can be killed at any moment, also while it writes a checkpoint or deletes an old one. So a checkpoint counts only
once it holds the file `complete`, written after everything else, and removed before anything else; until then it holds
the file `unfinished`, and a folder with neither is not the run's. An older checkpoint is deleted only when the newer
one is complete. `complete` holds a fingerprint of all files, and of the metrics until then, by which damage is noticed.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillkit.config.errors import UserError
from distillkit.runs.fingerprints import differences, digest_of, fingerprint, is_cheap
from distillkit.runs.names import CHECKPOINT, COMPLETE, METRICS, WRITING
from distillkit.runs.writing import flush, read_json, read_sealed, write_sealed


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, and the optimizer steps made until then."""

    path: Path
    step: int

    def reached_the_end(self) -> bool:
        """Whether all steps of its run were made."""
        state = read_json(self.path / "trainer_state.json")
        return bool(state["global_step"] >= state["max_steps"])

    def damage(self) -> list[str]:
        """What is not as it was written: one phrase per file. Those of earlier versions cannot be checked."""
        try:
            then = self._written().get("files")
        except UserError:
            return [f"{COMPLETE} is damaged"]
        return [] if then is None else differences(_files(self.path), then)

    def checked_by(self) -> str:
        """How its files were checked, for people."""
        then = self._written().get("files")
        if then is None:
            return "its files are not checked: it is of an earlier version"
        return "its files are whole" if is_cheap(then) else "its files have the sizes and times that they had"

    def metrics(self) -> bytes | None:
        """The metrics of its run when it was written; None where there are none to restore.

        Raises `UserError` where the file no longer holds them.
        """
        then, path = self._written().get("metrics"), self.path.parent / METRICS
        if then is None or not path.exists():
            return None
        with path.open("rb") as file:
            content = file.read(then["size"])
        if digest_of(content) != then["digest"]:
            raise UserError(
                path,
                f"is damaged: its lines until step {self.step} are not what {self.path.name} was written with; restore "
                "it, or remove it to go on without them",
            )
        return content

    def _written(self) -> dict[str, Any]:
        """The content of `complete`, which was empty once."""
        path = self.path / COMPLETE
        return read_sealed(path) if path.stat().st_size else {}


def complete_checkpoints(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    found = [Checkpoint(path, step) for path, step in _numbered(folder) if (path / COMPLETE).exists()]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def begin(path: Path) -> dict[str, Any]:
    """Make the folder of a checkpoint, which does not count yet. Every file in it is of the run.

    Returns what `complete` will say of the metrics until now: later ones are none of the checkpoint's.
    """
    path.mkdir(exist_ok=True)
    (path / WRITING).touch()
    flush(path)
    metrics = path.parent / METRICS
    if not metrics.exists():
        return {}
    content = metrics.read_bytes()
    return {"metrics": {"size": len(content), "digest": digest_of(content)}}


def mark_complete(path: Path, begun: dict[str, Any]) -> None:
    """Declare a checkpoint complete, once all that it holds has reached the disk, and the metrics until it began.

    begun: of `begin`.
    """
    files = _files(path)
    flush_files([*path.rglob("*"), path.parent / METRICS])
    write_sealed(path / COMPLETE, {"files": fingerprint(files, limit=None), **begun})
    (path / WRITING).unlink(missing_ok=True)
    flush(path)


def flush_files(paths: Iterable[Path]) -> None:
    """Wait until the files among the paths have reached the disk."""
    for path in paths:
        if path.is_file():
            flush(path)


def delete(path: Path) -> None:
    """Delete a checkpoint. Killed half-way, what is left does not count as one."""
    if (path / COMPLETE).exists():
        os.replace(path / COMPLETE, path / WRITING)
    for each in path.iterdir():  # the mark goes last: until then a killed deletion is done again
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        elif each.name != WRITING:
            each.unlink()
    (path / WRITING).unlink(missing_ok=True)
    path.rmdir()


def delete_incomplete(folder: Path) -> None:
    """Delete what a killed run left half-written or half-deleted."""
    for path, _ in _numbered(folder):
        if not (path / COMPLETE).exists() and ((path / WRITING).exists() or not any(path.iterdir())):
            delete(path)


def refuse_others(folder: Path) -> None:
    """Raises `UserError` for a folder that has the name of a checkpoint, and is none that a run wrote to its end."""
    for path, _ in _numbered(folder):
        if not (path / COMPLETE).exists() and not (path / WRITING).exists() and any(path.iterdir()):
            raise UserError(
                path,
                f"is no checkpoint that this run wrote to its end: it lacks the file {COMPLETE!r}, which a copy may "
                "have lost; restore the file, or rename or remove the folder",
            )


def newest_whole(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose files are as they were written; damaged ones that are newer are deleted.

    say: is given a line about each of these.

    Raises `UserError` where there are checkpoints, and none is whole.
    """
    damaged: list[tuple[Checkpoint, list[str]]] = []
    for checkpoint in reversed(complete_checkpoints(folder)):
        found = checkpoint.damage()
        if not found:
            for each, damage in damaged:
                say(f"{each.path.name} is damaged ({_in_short(damage)}) and deleted; {checkpoint.path.name} is older")
                delete(each.path)
            return checkpoint
        damaged.append((checkpoint, found))
    if damaged:
        newest, damage = damaged[0]
        raise UserError(
            newest.path,
            f"is damaged ({_in_short(damage)}), and there is no other to resume from; restore it, or remove it to "
            "start from the beginning",
        )
    return None


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


def _numbered(folder: Path) -> list[tuple[Path, int]]:
    """Folders that have the name of a checkpoint, and their steps."""
    named = [(path, path.name.removeprefix(CHECKPOINT)) for path in folder.glob(f"{CHECKPOINT}*") if path.is_dir()]
    return [(path, int(step)) for path, step in named if step.isascii() and step.isdecimal()]


def _files(path: Path) -> dict[str, Path]:
    """The files of a checkpoint by name, but for its marks and what a killed write of these left."""
    files = {str(each.relative_to(path)): each for each in sorted(path.rglob("*")) if each.is_file()}
    return {name: each for name, each in files.items() if name not in (COMPLETE, WRITING) and not name.startswith(".")}


def _in_short(damage: list[str]) -> str:
    return damage[0] + (f" and {len(damage) - 1} more" if len(damage) > 1 else "")
