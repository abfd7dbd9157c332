"""The folder of a run: whether a run may start there, resume there, or is finished.

A run resumes only with the configuration that it was started with: what differs in a way that matters to the weights
is named. Phases that the YAML names have folders of their own within the run's; a run without `phases` is its only
phase, and the run's folder that phase's. A phase that has begun stays as it was; later ones may still be changed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distillkit.config import Phase, Run, RunConfig, UserError
from distillkit.config.errors import shown
from distillkit.runs.checkpoints import (
    Checkpoint,
    complete_checkpoints,
    delete_incomplete,
    newest_whole,
    refuse_others,
)
from distillkit.runs.names import CHECKPOINT, METRICS, PHASES, PREPARED, RESULTS, RUN, UNTRAINED
from distillkit.runs.provenance import processes
from distillkit.runs.record import RunRecord, kept_config, new_record, origin, read_record
from distillkit.runs.secrets import HIDDEN
from distillkit.runs.writing import read_sealed, remove_leftovers, write_whole

FREE_TO_CHANGE = (
    "output_path",
    "resume",
    "parallel",
    "project_name",
    "functionary_packing",
    "teacher.kwargs.revision",  # the commit itself is compared
    "teacher.devices",
    "teacher.url",  # what is served there is compared
    "teacher.max_length",
    "teacher.concurrency",
    "teacher.api_key_env",
    "teacher.steps_ahead",
    "teacher.patience",
    "dataset.prepared_dataset_path",
    "dataset.dataset_num_proc",
    "evaluation.prompts",
    "evaluation.max_new_tokens",
    "evaluation.temperature",
    "evaluation.top_p",
    "evaluation.seed",
    "training_args.log",
    "training_args.save_",
    "training_args.eval_",
    "training_args.per_device_eval_batch_size",
    "training_args.report_to",
    "training_args.run_name",
    "training_args.push_to_hub",
    "training_args.hub_",
    "training_args.trackio_",
    "training_args.dataloader_num_workers",
    "training_args.dataloader_p",
    "training_args.skip_memory_metrics",
    "training_args.torch_empty_cache_steps",
    "training_args.ddp_timeout",
)
"""Beginnings of the keys that do not matter to the weights."""

_MICRO_BATCHES = ("training_args.per_device_train_batch_size", "training_args.gradient_accumulation_steps")
_CONTEXT = "parallel.context"


@dataclass(frozen=True)
class PhaseFolder:
    """The opened folder of a phase: the checkpoint to resume from, if any, and whether the phase is finished."""

    path: Path
    checkpoint: Checkpoint | None
    finished: bool
    main_process: bool = True

    @property
    def untrained(self) -> Path:
        """Where the converted student lies, before any training."""
        return self.path / UNTRAINED

    @property
    def record(self) -> RunRecord:
        """`run.json` as it is now."""
        return read_record(self.path) or RunRecord(config={})

    def update_record(self, **facts: Any) -> None:
        """Change fields of `run.json`. Every process calls it, one of them writes."""
        if self.main_process:
            replace(self.record, **facts).write(self.path)


def open_run(run: Run, *, main_process: bool = True) -> bool:
    """Whether the run is finished. Writes `run.json` where the run's folder is not that of a phase, too.

    Raises:
        UserError: there is a run already and `resume` is not set, or it is set and something has changed that has had
            its effect.
    """
    folder = run.folder
    for each in {folder, *(phase.folder for phase in run.phases)}:
        refuse_foreign_files(each)
        refuse_others(each)
    finished = bool(read_sealed(folder / RESULTS))
    former = read_record(folder)
    if not run.config.resume:
        _refuse_to_overwrite(folder)
    elif former is not None and _held(folder):
        _refuse_changes(run, former, finished)
    if main_process and run.has_phase_folders and not finished:
        _begin(run.config, folder, resumed=run.config.resume and former is not None)
    return finished


def open_phase(
    phase: Phase, *, resume: bool, main_process: bool = True, say: Callable[[str], None] = lambda line: None
) -> PhaseFolder:
    """Open the folder of a phase of an opened run, and write `run.json` where the phase begins.

    The main process comes first, and leaves only whole checkpoints. say: is given a line about each damaged one.

    Raises `UserError` where files are damaged and there is no older checkpoint.
    """
    folder = phase.folder
    finished = bool(read_sealed(folder / RESULTS))
    if main_process:
        folder.mkdir(parents=True, exist_ok=True)
        delete_incomplete(folder)
        if not finished:
            checkpoint = newest_whole(folder, say)
            _restore_metrics(folder, checkpoint)
            _begin(phase.config, folder, resumed=resume and checkpoint is not None)
    checkpoints = complete_checkpoints(folder)
    return PhaseFolder(folder, checkpoints[-1] if checkpoints else None, finished, main_process)


def begun_phases(folder: Path) -> list[Path]:
    """Folders of the phases of a run that hold something to resume from, in their order."""
    found = [path for path in (folder / PHASES).glob("*-*") if path.name.partition("-")[0].isdigit()]
    return sorted((path for path in found if _held(path)), key=lambda path: int(path.name.partition("-")[0]))


def _begin(config: RunConfig, folder: Path, *, resumed: bool) -> None:
    """Write `run.json`: a new one, or the former with one more entry of `resumed`."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    former = read_record(folder)
    if resumed and former is not None:
        resumptions = [*(former.resumed or []), origin()]
        replace(former, config=kept_config(config), resumed=resumptions, processes=processes()).write(folder)
    else:
        converted = None if former is None else former.converted
        new_record(config, converted=converted, processes=processes()).write(folder)


def _restore_metrics(folder: Path, checkpoint: Checkpoint | None) -> None:
    """Drop what was logged after the checkpoint."""
    if checkpoint is None:
        (folder / METRICS).unlink(missing_ok=True)
    elif (content := checkpoint.metrics()) is not None:
        write_whole(folder / METRICS, content)


def _held(folder: Path) -> list[str]:
    """Names of a few things of a run that would be lost if another began in the folder."""
    held = [checkpoint.path.name for checkpoint in complete_checkpoints(folder)[-1:]]
    held += [path.name for pattern in (RESULTS, "*.safetensors") for path in sorted(folder.glob(pattern))[:1]]
    return held + [f"{PHASES}/{path.name}" for path in begun_phases(folder)[-1:]]


def refuse_foreign_files(folder: Path) -> None:
    """Raises `UserError` for a folder with files that a run would overwrite, and that no run of this package wrote."""
    if (folder / RUN).exists():
        return
    patterns = ("*.safetensors", f"{CHECKPOINT}*", RESULTS, METRICS, UNTRAINED, PREPARED)
    held = sorted(path.name for pattern in patterns for path in folder.glob(pattern))
    if held:
        raise UserError(
            "output_path",
            f"{str(folder)!r} holds {held[0]}, which is not of a run of distillkit; choose another folder",
        )


def _refuse_to_overwrite(folder: Path) -> None:
    """Raises `UserError` for a folder that holds a run."""
    if held := _held(folder):
        raise UserError(
            "output_path",
            f"{str(folder)!r} holds a run already ({', '.join(held)}); pass --resume to go on with it, or choose "
            "another output_path",
        )


def _refuse_changes(run: Run, former: RunRecord, finished: bool) -> None:
    """Raises `UserError` where what has begun was started with something else."""
    folder = run.folder
    former_names = [phase["name"] for phase in former.config.get("phases") or []]
    if not run.has_phase_folders:
        for key, now, then in changed_keys(run.config, former.config, None if finished else former.processes):
            raise _changed(key, now, then, folder)
        return
    if not former_names and (finished or complete_checkpoints(folder)):
        raise _changed("phases[0].name", run.phases[0].name, None, folder)
    begun = begun_phases(folder)
    if len(begun) > len(run.phases):
        raise UserError(
            "phases",
            f"are {len(run.phases)}, but {len(begun)} have begun in {str(folder)!r}; resume with all of them, or "
            "choose another output_path",
        )
    for phase, path in zip(run.phases, begun, strict=False):
        _refuse_changes_of_phase(phase, path, folder)
    shorter = min(len(run.phases), len(former_names))
    if len(run.phases) != len(former_names) and len(begun) >= shorter > 0 and (begun[shorter - 1] / RESULTS).exists():
        raise UserError(
            "phases",
            f"are {len(run.phases)}, but the run in {str(folder)!r} was started with {len(former_names)}, and its "
            f"student of {begun[shorter - 1].name} is saved already as that needs; resume with those, or start from "
            f"that student (model: {begun[shorter - 1]}) in another output_path",
        )


def _refuse_changes_of_phase(phase: Phase, begun: Path, folder: Path) -> None:
    if begun.name != phase.folder.name:
        raise _changed(f"phases[{phase.index}].name", phase.name, begun.name.partition("-")[2], folder)
    former = read_record(begun)
    former = former or RunRecord(config={})
    for key, now, then in changed_keys(phase.config, former.config, former.processes):
        if key != "model" or phase.index == 0:  # of later phases it is the folder of the phase before
            raise _changed(phase.key(key), now, then, folder)


def _changed(key: str, now: Any, then: Any, folder: Path) -> UserError:
    started = "without it; remove it" if then is None else f"with {shown(then)}; resume with that"
    return UserError(
        key, f"is {shown(now)}, but the run in {str(folder)!r} was started {started}, or choose another output_path"
    )


def changed_keys(
    config: RunConfig, former: dict[str, Any], former_processes: int | None = None
) -> Iterator[tuple[str, Any, Any]]:
    """Keys that matter to the weights and are not as they were: each with its value now and then.

    former_processes: where they are known, and another number of them, or of groups that share rows, reads as many rows
    in a step, it may do so in other micro-batches: these are the same rows in the same order.
    """
    now, then = dict(_flat(kept_config(config))), dict(_flat(_completed(former)))
    readers = processes() // now.get(_CONTEXT, 1)
    if former_processes is not None and former_processes // then.get(_CONTEXT, 1) != readers:
        step_now, step_then = _rows_of_step(now, processes()), _rows_of_step(then, former_processes)
        if step_now != step_then:
            yield _MICRO_BATCHES[1], f"{step_now} rows in a step", f"{step_then} rows in a step"
        for key in _MICRO_BATCHES:
            now.pop(key, None)
            then.pop(key, None)
    for key in [*now, *(key for key in then if key not in now)]:
        secret = HIDDEN in f"{now.get(key)}{then.get(key)}"  # which may be another, and is not kept
        if now.get(key) != then.get(key) and not secret and not key.startswith(FREE_TO_CHANGE):
            yield key, now.get(key), then.get(key)


def _rows_of_step(flat: dict[str, Any], processes: int) -> int:
    """Rows that all processes together read for a step of the optimizer. Trainer's defaults are 8 and 1."""
    size, accumulated = (flat.get(key, default) for key, default in zip(_MICRO_BATCHES, (8, 1), strict=True))
    return int(size * accumulated * processes // flat.get(_CONTEXT, 1))


def _completed(former: dict[str, Any]) -> dict[str, Any]:
    """A former configuration, with the defaults of keys that came after it; as it is, where it is no longer legal."""
    try:
        return kept_config(RunConfig.parse(former))
    except UserError:
        return former


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """`loss_functions[1].temperature` and its value, for every value that holds no others; an empty list is none."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{path}[{index}]")
    else:
        yield path, value
