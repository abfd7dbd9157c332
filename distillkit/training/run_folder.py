"""The folder of a run: whether a run may start there, go on there, or is through already.

`run.json` holds the configuration a run was started with. A run goes on only under the same one: what differs in a way
that matters to the weights is named.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillkit.config import RunConfig, UserError
from distillkit.config.errors import shown
from distillkit.provenance import commit, versions
from distillkit.training.checkpoints import PREFIX, Checkpoint, complete_checkpoints, delete_incomplete

RUN = "run.json"
RESULTS = "results.json"
METRICS = "metrics.jsonl"
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
            write_json(self.path / RUN, {**_read(self.path / RUN), key: value})

    def noted(self, key: str) -> Any:
        """A fact kept by `note`; None if there is none."""
        return _read(self.path / RUN).get(key)


def open_run_folder(config: RunConfig, *, main_process: bool = True) -> RunFolder:
    """Open `output_path` for a run, and write `run.json`.

    Raises:
        UserError: there is a run already and `resume` is not set, or it is set and the configuration has changed.
    """
    folder = Path(config.output_path)
    if not (folder / RUN).exists():
        _refuse_what_is_not_ours(folder)
    checkpoints = complete_checkpoints(folder)
    finished = (folder / RESULTS).exists()
    described = config.model_dump(mode="json")
    former = _read(folder / RUN).get("config")
    if not config.resume:
        _refuse_to_overwrite(folder, checkpoints)
    elif former is not None and (checkpoints or finished):
        _refuse_changes(described, former, folder)
    if main_process:
        folder.mkdir(parents=True, exist_ok=True)
        delete_incomplete(folder)
        if not checkpoints and not finished:
            kept = {"converted": _read(folder / RUN).get("converted")}  # what lies in `untrained`
            started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            write_json(
                folder / RUN,
                {**kept, "started": started, "versions": versions(), "commit": commit(), "config": described},
            )
    return RunFolder(folder, checkpoints[-1] if checkpoints else None, finished, main_process)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file so that a reader sees the old content or the new, never a part."""
    staged = path.with_name(f".{path.name}.tmp")
    staged.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(staged, path)


def _refuse_what_is_not_ours(folder: Path) -> None:
    held = sorted(path.name for pattern in ("*.safetensors", f"{PREFIX}*", RESULTS) for path in folder.glob(pattern))
    if held:
        raise UserError(
            f"output_path: {str(folder)!r} holds {held[0]}, which is not of a run of distillkit; choose another folder"
        )


def _refuse_to_overwrite(folder: Path, checkpoints: list[Checkpoint]) -> None:
    held = [checkpoint.path.name for checkpoint in checkpoints[-1:]]
    held += [path.name for pattern in (RESULTS, "*.safetensors") for path in sorted(folder.glob(pattern))[:1]]
    if held:
        raise UserError(
            f"output_path: {str(folder)!r} holds a run already ({', '.join(held)}); pass --resume to go on with it, or "
            "choose another output_path"
        )


def _refuse_changes(config: dict[str, Any], former: dict[str, Any], folder: Path) -> None:
    now, then = dict(_flat(config)), dict(_flat(_completed(former)))
    for key in [*now, *(key for key in then if key not in now)]:
        if now.get(key) != then.get(key) and not key.startswith(FREE_TO_CHANGE):
            raise UserError(
                f"{key}: is {shown(now.get(key))}, but the run in {str(folder)!r} was started with "
                f"{shown(then.get(key))}; resume with that, or choose another output_path"
            )


def _completed(former: dict[str, Any]) -> dict[str, Any]:
    """A former configuration, with the defaults of keys that came after it; as it is, where it is no longer legal."""
    try:
        return RunConfig.parse(former).model_dump(mode="json")
    except UserError:
        return former


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """`loss_functions[1].temperature` and its value, for every value that holds no others."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{path}[{index}]")
    else:
        yield path, value


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
