"""`phases`: one run after another, each going on with the weights of the one before.

The top level of the YAML is a whole run, and each phase names what differs from it. `phases_of` makes of the two the
whole runs that are trained.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from distillkit.config.data import move_dataset_keys
from distillkit.config.errors import KeyProblem, UserError, shown
from distillkit.config.merging import merged
from distillkit.config.section import AnyMapping, Section
from distillkit.config.tokens import BUDGETS, TokenBudget, budgets, check_one_budget
from distillkit.config.training_args import check_training_args

if TYPE_CHECKING:
    from distillkit.config.run import RunConfig  # whose field `phases` needs this file

MERGED = ("training_args", "dataset", "evaluation")
"""Keys of a phase that change the top level's key by key; the others take its place."""

HUB = ("push_to_hub", "hub_")
"""Beginnings of the training arguments that are of the whole run."""

_NAME = re.compile(r"[a-z0-9_-]+")

WHERE_THE_ORIGINAL_IS = ("gguf_file", "revision", "code_revision", "subfolder", "variant")
"""Keyword arguments of `from_pretrained` that make no sense for a student saved by the phase before."""


class PhaseConfig(Section):
    """One phase: its name, and what differs from the top level.

    The values are those of the YAML, unchecked: only together with the top level's can they be.
    """

    name: str = Field(
        description="name of the phase, unique: letters a-z, digits, _ and -",
        json_schema_extra={"pattern": f"^{_NAME.pattern}$"},
    )
    tokens: TokenBudget = Field(None, description="for how long this phase trains, in tokens: 100M")
    teacher: Any = Field(None, description="another teacher")
    frozen_modules: Any = Field(None, description="other frozen modules")
    frozen_res: Any = Field(None, description="other patterns of frozen parameters; [] trains all")
    sequence_length: Any = Field(None, description="another length of rows, in tokens")
    dataset: Any = Field(None, description="keys of dataset that differ")
    loss_functions: Any = Field(None, description="other losses")
    layer_mapping: Any = Field(None, description="another mapping of layers")
    force_hidden_state_projection: Any = Field(None, description="whether hs_ losses use a learned projection")
    training_args: AnyMapping = Field(default={}, description="training arguments that differ")
    trained_weights: Any = Field(None, description="another storage of weights that train")
    evaluation: Any = Field(None, description="keys of evaluation that differ; null measures nothing")

    @model_validator(mode="before")
    @classmethod
    def move_keys(cls, data: Any) -> Any:
        return move_dataset_keys(data)

    @field_validator("name")
    @classmethod
    def check_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise KeyProblem("", f"names a folder: letters a-z, digits, _ and - only, got {shown(name)}")
        return name

    @field_validator("training_args")
    @classmethod
    def check_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        checked = check_training_args(arguments)
        for name in checked:
            if name.startswith(HUB):
                raise KeyProblem(name, "the hub gets the whole run, once; name it in training_args of the top level")
        return checked

    @model_validator(mode="after")
    def check_budget(self) -> "PhaseConfig":
        check_one_budget(self.changes)
        return self

    @model_serializer(mode="wrap")
    def only_what_is_named(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A key that is not named is the top level's; one that is named as null is not."""
        named: dict[str, Any] = handler(self)
        return {key: value for key, value in named.items() if key in self.model_fields_set}

    @property
    def changes(self) -> dict[str, Any]:
        """The keys that the phase names, but for its name."""
        return {key: getattr(self, key) for key in type(self).model_fields if key in self.model_fields_set - {"name"}}

    def names(self, key: str) -> bool:
        """Whether the phase itself, not the top level, names a key such as `dataset.train_dataset.split`."""
        section: Any = self.changes
        for depth, part in enumerate(key.split(".")):
            name = part.partition("[")[0]
            if name not in section:
                return False
            section = section[name]
            if not isinstance(section, Mapping) or (depth == 0 and name not in MERGED):
                return True
        return True

    def replaces(self, key: str) -> bool:
        """Whether nothing is left of the top level's `key`, such as `tokens`, for the phase has its own."""
        if tuple(key.split(".")) in BUDGETS:
            return bool(budgets(self.changes))
        value: Any = self.changes
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return False
            value = value[part]
            if key.partition(".")[0] not in MERGED or not isinstance(value, Mapping):
                return True
        return False


@dataclass(frozen=True)
class Phase:
    """A phase as the whole run that it is."""

    name: str
    config: "RunConfig"


def phases_of(run: "RunConfig") -> list[Phase]:
    """The phases of a run, in order; none where it has none.

    Each writes to a folder of its own in the run's, `phases/1-alignment`. The first starts as the top level says, each
    later one from what the one before left in its folder. Raises `KeyProblem`, with a path such as
    `phases[1].loss_functions[0].temperature`, for the first phase that cannot be.
    """
    found: list[Phase] = []
    top = run.model_dump(exclude={"phases"})
    if "use_flash_attention" not in run.model_fields_set:
        del top["use_flash_attention"]  # nobody asked, so nobody is told where the package is missing
    for index, phase in enumerate(run.phases):
        data = _whole(top, phase, index, found[-1].config.output_path if found else None)
        try:
            found.append(Phase(phase.name, type(run).parse(data)))
        except UserError as error:
            raise _in_phase(error, phase, index) from None
    return found


def check_names(phases: list[PhaseConfig]) -> None:
    """Raises `KeyProblem` where two phases have the same name."""
    first: dict[str, int] = {}
    for index, phase in enumerate(phases):
        if phase.name in first:
            raise KeyProblem(
                f"[{index}].name", f"{phase.name!r} is phases[{first[phase.name]}] already; name each once"
            )
        first[phase.name] = index


def _whole(top: dict[str, Any], phase: PhaseConfig, index: int, before: str | None) -> dict[str, Any]:
    """The keys of the run that a phase is; `before` is the folder of the phase before it."""
    changes = phase.changes
    inherited = {key: value for key, value in top.items() if key in MERGED or key not in changes}
    whole = merged(inherited, changes)
    whole["output_path"] = str(Path(top["output_path"]) / "phases" / f"{index + 1}-{phase.name}")
    if before is not None:
        kwargs = {name: each for name, each in top["model_kwargs"].items() if name not in WHERE_THE_ORIGINAL_IS}
        whole |= {"model": before, "student": None, "model_kwargs": kwargs}
    whole["training_args"] = _arguments(whole, top, phase)
    if isinstance(whole["dataset"], Mapping):
        whole["dataset"] = _dataset(whole["dataset"], changes.get("dataset") or {}, phase, index)
    return whole


def _arguments(whole: dict[str, Any], top: dict[str, Any], phase: PhaseConfig) -> dict[str, Any]:
    """Trackers show a run for each phase; the hub gets the whole, once, and no phase by itself."""
    arguments = dict(whole["training_args"])
    if phase.training_args.get("run_name") is None:
        arguments["run_name"] = f"{top['training_args'].get('run_name') or top['project_name']}-{phase.name}"
    return {name: value for name, value in arguments.items() if not name.startswith(HUB)}


def _dataset(dataset: Mapping[str, Any], changes: Mapping[str, Any], phase: PhaseConfig, index: int) -> dict[str, Any]:
    """Each phase reads the same rows in another order, and keeps its prepared rows where no other does."""
    own = dict(dataset)
    if "seed" not in changes and isinstance(own.get("seed"), int):
        own["seed"] += index
    if "prepared_dataset_path" not in changes and own.get("prepared_dataset_path") is not None:
        own["prepared_dataset_path"] = f"{own['prepared_dataset_path']}-{phase.name}"
    return own


def _in_phase(error: UserError, phase: PhaseConfig, index: int) -> KeyProblem:
    key, _, problem = str(error).partition(": ")
    note = "" if phase.names(key) else f" (phase {phase.name!r} does not name it and has the top level's)"
    return KeyProblem(f"phases[{index}].{key}", problem + note)
