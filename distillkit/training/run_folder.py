"""The folder of a run: whether a run may start there, go on there, or is through already.

`run.json` holds the configuration a run was started with. A run goes on only under the same one: what differs in a way
that matters to the weights is named. The phases of a run have folders of their own within its folder.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillkit.config import RunConfig, UserError
from distillkit.config.errors import shown
from distillkit.reporting.reading import PHASES, RESULTS, RUN
from distillkit.runs.checkpoints import PREFIX, Checkpoint, complete_checkpoints, delete_incomplete
from distillkit.runs.provenance import command, commit, versions, without_secrets
from distillkit.runs.writing import read_json, remove_leftovers, write_json

UNTRAINED = "untrained"

FREE_TO_CHANGE = (
    "output_path",
    "resume",
    "project_name",
    "functionary_packing",
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


@dataclass(frozen=True)
class RunFolder:
    """An opened run folder: the checkpoint to go on from, if any, and whether all is done."""

    path: Path
    checkpoint: Checkpoint | None
    finished: bool
    main_process: bool = True

    @property
    def untrained(self) -> Path:
        """Where the converted teacher lies, before any training."""
        return self.path / UNTRAINED

    def note(self, key: str, value: Any) -> None:
        """Keep a fact about the run that a resumed run needs again. All ranks know it, one writes it."""
        if self.main_process:
            write_json(self.path / RUN, {**read_json(self.path / RUN), key: value})

    def noted(self, key: str) -> Any:
        """A fact kept by `note`; None if there is none."""
        return read_json(self.path / RUN).get(key)


def open_run_folder(config: RunConfig, *, main_process: bool = True, derived: tuple[str, ...] = ()) -> RunFolder:
    """Open `output_path` for a run, and write `run.json`.

    derived: keys that are not the user's, and may differ from those that the run was started with.

    Raises:
        UserError: there is a run already and `resume` is not set, or it is set and the configuration has changed.
    """
    folder = Path(config.output_path)
    refuse_what_is_not_ours(folder)
    checkpoints = complete_checkpoints(folder)
    finished = (folder / RESULTS).exists()
    former = read_json(folder / RUN).get("config")
    if not config.resume:
        refuse_to_overwrite(folder)
    elif former is not None and held_by_run(folder):
        for key, now, then in changes(config, former):
            if key not in derived:
                refuse_change(key, now, then, folder)
    if main_process:
        folder.mkdir(parents=True, exist_ok=True)
        delete_incomplete(folder)
        remove_leftovers(folder)
        if not checkpoints and not finished:
            begin_run_file(config, folder)
    return RunFolder(folder, checkpoints[-1] if checkpoints else None, finished, main_process)


def begin_run_file(config: RunConfig, folder: Path) -> None:
    """Write `run.json` of a run that begins."""
    kept = {"converted": read_json(folder / RUN).get("converted")}  # what lies in `untrained`
    write_json(folder / RUN, {**kept, **origin(), "config": kept_config(config)})


def origin() -> dict[str, Any]:
    """When a run was started or gone on with, and by what."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command(),
        "versions": versions(),
        "commit": commit(),
    }


def kept_config(config: RunConfig) -> dict[str, Any]:
    """The configuration as files keep it, which others may read: without keys of servers and tokens of the hub."""
    kept: dict[str, Any] = without_secrets(config.model_dump(mode="json"))
    return kept


def begun_phases(folder: Path) -> list[Path]:
    """Folders of the phases of a run that hold something to go on from, in their order."""
    found = [path for path in (folder / PHASES).glob("*-*") if path.name.partition("-")[0].isdigit()]
    return sorted((path for path in found if held_by_run(path)), key=lambda path: int(path.name.partition("-")[0]))


def held_by_run(folder: Path) -> list[str]:
    """What of a run is in a folder that would be lost if another began there: a few names."""
    held = [checkpoint.path.name for checkpoint in complete_checkpoints(folder)[-1:]]
    held += [path.name for pattern in (RESULTS, "*.safetensors") for path in sorted(folder.glob(pattern))[:1]]
    return held + [f"{PHASES}/{path.name}" for path in begun_phases(folder)[-1:]]


def refuse_what_is_not_ours(folder: Path) -> None:
    """Raises `UserError` for a folder with models or checkpoints that no run of this package wrote."""
    if (folder / RUN).exists():
        return
    held = sorted(path.name for pattern in ("*.safetensors", f"{PREFIX}*", RESULTS) for path in folder.glob(pattern))
    if held:
        raise UserError(
            "output_path",
            f"{str(folder)!r} holds {held[0]}, which is not of a run of distillkit; choose another folder",
        )


def refuse_to_overwrite(folder: Path) -> None:
    """Raises `UserError` for a folder that holds a run."""
    held = held_by_run(folder)
    if held:
        raise UserError(
            "output_path",
            f"{str(folder)!r} holds a run already ({', '.join(held)}); pass --resume to go on with it, or "
            "choose another output_path",
        )


def refuse_change(key: str, now: Any, then: Any, folder: Path) -> None:
    """Raises `UserError` for a key that is not what a run was started with."""
    started = "without it; remove it" if then is None else f"with {shown(then)}; resume with that"
    raise UserError(
        key, f"is {shown(now)}, but the run in {str(folder)!r} was started {started}, or choose another output_path"
    )


def changes(config: RunConfig, former: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Keys that matter to the weights and are not as they were: each with its value now and then."""
    now, then = dict(_flat(kept_config(config))), dict(_flat(_completed(former)))
    for key in [*now, *(key for key in then if key not in now)]:
        if now.get(key) != then.get(key) and not key.startswith(FREE_TO_CHANGE):
            yield key, now.get(key), then.get(key)


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
