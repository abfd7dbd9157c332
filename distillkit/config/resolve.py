"""Resolves a configuration to a run: one or more phases, each with a whole configuration of its own.

The top level of the YAML is a whole run, and each of its `phases` contains only what differs. A run without `phases`
is one phase. Training, planning and reporting all loop over the same list. Imports no torch.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillkit.config.errors import UserError
from distillkit.config.merging import merged
from distillkit.config.phases import HUB, MERGED, PhaseConfig
from distillkit.config.run import RunConfig
from distillkit.config.yaml_files import read_changed

logger = logging.getLogger(__name__)

ORIGIN_KWARGS = ("gguf_file", "revision", "code_revision", "subfolder", "variant")
"""Keyword arguments of `from_pretrained` that do not apply to a student saved by the phase before."""


@dataclass(frozen=True)
class Phase:
    """One phase: its whole configuration, and its position among the phases."""

    config: RunConfig
    index: int = 0
    count: int = 1
    changes: PhaseConfig | None = None
    """Its entry in `phases`; None where the run has no `phases`."""

    @property
    def name(self) -> str:
        return "training" if self.changes is None else self.changes.name

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    @property
    def folder(self) -> Path:
        return Path(self.config.output_path)

    def __str__(self) -> str:
        return self.name if self.changes is None else f"phase {self.index + 1} of {self.count}: {self.name}"

    def key(self, key: str) -> str:
        """A key of this phase as it is in the YAML: in the phase, or at the top level."""
        return f"phases[{self.index}].{key}" if self.names(key) else key

    def names(self, key: str | None) -> bool:
        """Whether a key is in the phase itself, not only at the top level."""
        return self.changes is not None and key is not None and self.changes.names(key)

    def located(self, error: UserError) -> UserError:
        """An error about this phase's configuration, with its key as in the YAML."""
        if self.changes is None or error.located:
            return error
        if self.names(error.key):
            return error.under(f"phases[{self.index}]", located=True)
        return UserError(error.key, f"{error.problem} (in phase {self.name!r})", located=True)

    @contextmanager
    def locating(self) -> Iterator[None]:
        """Within it a `UserError` is one about this phase: `located`."""
        try:
            yield
        except UserError as error:
            raise self.located(error) from None


@dataclass(frozen=True)
class Run:
    """A run: its configuration as in the YAML, and its phases in order, at least one."""

    config: RunConfig
    phases: tuple[Phase, ...]

    @property
    def folder(self) -> Path:
        return Path(self.config.output_path)

    @property
    def has_phase_folders(self) -> bool:
        """Whether each phase has a folder of its own: where the YAML has `phases`."""
        return bool(self.config.phases)


def load_run(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Run:
    """The run that a YAML file describes, changed by `key=value` overrides.

    Raises `UserError`, one line that names the key and the remedy; warns of a key without effect.
    """
    config = RunConfig.parse(read_changed(Path(path), overrides))
    run = resolve(config)
    for override in overrides:
        _refuse_without_effect(override.partition("=")[0], config)
    if config.functionary_packing:
        logger.warning("functionary_packing: has no effect; packed documents never attend to each other anyway")
    return run


AnyRun = Run | RunConfig | Mapping[str, Any] | str | os.PathLike[str]
"""A run in any form: resolved, a configuration, the content of a YAML file, or its path."""


def as_run(run: AnyRun, overrides: Sequence[str] = ()) -> Run:
    """The run in any form, resolved. overrides: `key=value`, for the path of a YAML file."""
    if isinstance(run, (str, os.PathLike)):
        return load_run(run, overrides)
    if overrides:
        raise ValueError("overrides are for the path of a YAML file")
    if isinstance(run, Mapping):
        run = RunConfig.parse(dict(run))
    return resolve(run) if isinstance(run, RunConfig) else run


def resolve(config: RunConfig) -> Run:
    """The phases of a run.

    Phases of the YAML have folders of their own in that of the run, such as `phases/1-alignment`. The first starts
    from the top level's student, each later one from the student of the phase before. Raises `UserError`, with a key
    such as `phases[1].loss_functions[0].temperature`, for the first phase with a mistake.
    """
    if not config.phases:
        return Run(config, (Phase(config),))
    phases: list[Phase] = []
    top = config.model_dump(exclude={"phases"})
    if "use_flash_attention" not in config.model_fields_set:
        del top["use_flash_attention"]  # only who set it is warned where the package is missing
    for index, changes in enumerate(config.phases):
        data = _whole(top, changes, index, phases[-1].config.output_path if phases else None)
        place = (index, len(config.phases), changes)
        with Phase(config, *place).locating():
            phases.append(Phase(RunConfig.parse(data), *place))
    return Run(config, tuple(phases))


def _refuse_without_effect(key: str, config: RunConfig) -> None:
    """Raises `UserError` where each phase replaces the top level's `key`; warns where some do."""
    replacing = [phase.name for phase in config.phases if phase.replaces(key)]
    if replacing and len(replacing) == len(config.phases):
        raise UserError(key, f"every phase has its own; use phases.{replacing[0]}.{key}")
    for name in replacing:
        logger.warning("%s: has no effect on phase %s, which has its own; use phases.%s.%s", key, name, name, key)


def _whole(top: dict[str, Any], phase: PhaseConfig, index: int, before: str | None) -> dict[str, Any]:
    """The whole configuration of a phase; `before` is the folder of the phase before it."""
    changes = phase.changes
    inherited = {key: value for key, value in top.items() if key in MERGED or key not in changes}
    whole = merged(inherited, changes)
    whole["output_path"] = str(Path(top["output_path"]) / "phases" / f"{index + 1}-{phase.name}")
    if before is not None:
        kwargs = {name: each for name, each in top["model_kwargs"].items() if name not in ORIGIN_KWARGS}
        whole |= {"model": before, "student": None, "model_kwargs": kwargs}
    whole["training_args"] = _arguments(whole, top, phase)
    if isinstance(whole["dataset"], Mapping):
        whole["dataset"] = _dataset(whole["dataset"], changes.get("dataset") or {}, phase, index)
    return whole


def _arguments(whole: dict[str, Any], top: dict[str, Any], phase: PhaseConfig) -> dict[str, Any]:
    """Trackers show each phase as a run; only the whole run is uploaded to the hub."""
    arguments = dict(whole["training_args"])
    if phase.training_args.get("run_name") is None:
        arguments["run_name"] = f"{top['training_args'].get('run_name') or top['project_name']}-{phase.name}"
    return {name: value for name, value in arguments.items() if not name.startswith(HUB)}


def _dataset(dataset: Mapping[str, Any], changes: Mapping[str, Any], phase: PhaseConfig, index: int) -> dict[str, Any]:
    """Each phase reads the rows in another order, and stores its prepared rows in a folder of its own."""
    own = dict(dataset)
    if "seed" not in changes and isinstance(own.get("seed"), int):
        own["seed"] += index
    if "prepared_dataset_path" not in changes and own.get("prepared_dataset_path") is not None:
        own["prepared_dataset_path"] = f"{own['prepared_dataset_path']}-{phase.name}"
    return own
