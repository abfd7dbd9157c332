"""`distillkit CONFIG.yaml`: a distillation, or the phases of one, each going on with the student of the one before.

Every phase is a whole run in a folder of its own, `phases/1-alignment`: with `run.json`, metrics, checkpoints and a
loadable student. Only files connect them, so a run killed anywhere goes on with the phase that has no results yet, and
ends as if it had not been killed. The last phase's student is then put into `output_path`, and `results.json` last.

A phase that has begun stays as it was; those that have not may still be changed when the run is resumed.
"""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import GradientState, PartialState
from rich.console import Console
from transformers import PreTrainedModel, TrainingArguments

from distillkit.config import RunConfig, UserError
from distillkit.config.phases import Phase, phases_of
from distillkit.console import say
from distillkit.reporting import write_run_report
from distillkit.reporting.model_card import CARD
from distillkit.reporting.reading import METRICS
from distillkit.reporting.report import HTML, MARKDOWN
from distillkit.runs.checkpoints import complete_checkpoints
from distillkit.runs.writing import read_json, remove_leftovers, write_json
from distillkit.training.arguments import build_training_arguments
from distillkit.training.freezing import check_frozen
from distillkit.training.hub import check_token, push
from distillkit.training.interruption import EXIT_CODE
from distillkit.training.phase import Place, distill_once
from distillkit.training.processes import main_process_first
from distillkit.training.results import print_results_of_phases, write_results_of_phases
from distillkit.training.run_folder import (
    RESULTS,
    RUN,
    begin_run_file,
    begun_phases,
    changes,
    kept_config,
    origin,
    refuse_change,
    refuse_to_overwrite,
    refuse_what_is_not_ours,
)
from distillkit.training.saving import link_student


def distill(config: RunConfig, console: Console | None = None) -> Path:
    """Run a distillation and return the folder of the trained student, which is `output_path`.

    Raises:
        UserError: something in the configuration cannot be; the line names the key.
        SystemExit: with code 130, after Ctrl-C or SIGTERM and a last checkpoint; with 1 or 2 on all processes but the
            first, which has raised the error.
    """
    console = console or Console()
    check_token(config)
    phases = phases_of(config)
    try:
        if phases:
            _distill_phases(config, phases, console)
        else:
            distill_once(config, console, Place())
        main_process = PartialState().is_main_process
        PartialState().destroy_process_group()
        if main_process:
            push(config, console)
    except KeyboardInterrupt:  # while nothing is trained
        say(console, "interrupted; go on with --resume")
        raise SystemExit(EXIT_CODE) from None
    return Path(config.output_path)


def _distill_phases(config: RunConfig, phases: Sequence[Phase], console: Console) -> None:
    """All phases that are left, and then the results of the whole."""
    folder = Path(config.output_path)
    float32 = torch.backends.fp32_precision  # type: ignore[attr-defined]  # set from C, so no stub has it
    arguments = _check_arguments(config, phases)
    main_process = arguments.process_index == 0
    finished = main_process_first(arguments, lambda: _open(config, phases, main_process))
    console.quiet = console.quiet or not main_process
    if finished:
        say(console, f"{folder}: this run is finished already, nothing is left to do")
        if main_process and not (folder / HTML).exists():  # it was killed meanwhile
            say(console, write_run_report(folder))
        return
    for index in range(len(phases)):
        # training_args.tf32 is of the phase that names it.
        torch.backends.fp32_precision = float32  # type: ignore[attr-defined]
        _distill_phase(config, phases, index, console)
        _forget()
    if main_process:
        last = Path(phases[-1].config.output_path)
        link_student(last, folder, besides=(RUN, RESULTS, METRICS, CARD, HTML, MARKDOWN))
        results = write_results_of_phases(config, phases)
        print_results_of_phases(console, results)
        say(console, f"the student is in {folder}")
        say(console, write_run_report(folder))
    PartialState().wait_for_everyone()


def _distill_phase(config: RunConfig, phases: Sequence[Phase], index: int, console: Console) -> None:
    phase, place = phases[index].config, Place(index + 1, len(phases), phases[index].name)
    resume = config.resume and (Path(phase.output_path) / RUN).exists()
    try:
        distill_once(
            phase.model_copy(update={"resume": resume}),
            console,
            place,
            check=lambda student: _check_later(config, phases, index, student),
        )
    except UserError as error:
        raise error if str(error).startswith("phases[") else _in_phase(config, index, error) from None


def _check_later(config: RunConfig, phases: Sequence[Phase], index: int, student: PreTrainedModel) -> None:
    """Raises `UserError` where a later phase freezes what the student does not have: now, not when its turn comes."""
    for later, phase in list(enumerate(phases))[index + 1 :]:
        try:
            check_frozen(student, phase.config.frozen_res, phase.config.frozen_modules)
        except UserError as error:
            raise _in_phase(config, later, error) from None


def _check_arguments(config: RunConfig, phases: Sequence[Phase]) -> TrainingArguments:
    """Those of the first phase. Raises `UserError` where those of any phase cannot be: now, not when its turn comes."""
    built = []
    for index, phase in enumerate(phases):
        path = Path(phase.config.output_path)
        try:
            built.append(build_training_arguments(phase.config.training_args, path, uses_logits=True)[0])
        except UserError as error:
            raise _in_phase(config, index, error) from None
    return built[0]


def _open(config: RunConfig, phases: Sequence[Phase], main_process: bool) -> bool:
    """Open the folder of the whole, and write its `run.json`; whether all is done there already.

    Raises `UserError` where there is a run already and `resume` is not set, or it is set and something has changed
    that has had its effect.
    """
    folder = Path(config.output_path)
    refuse_what_is_not_ours(folder)
    finished = (folder / RESULTS).exists()
    former = read_json(folder / RUN)
    if not config.resume:
        refuse_to_overwrite(folder)
    elif former:
        _refuse_changes(config, phases, former["config"], folder, finished)
    if main_process and not finished:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        if config.resume and former:
            resumed = [*former.get("resumed", []), origin()]
            write_json(folder / RUN, {**former, "config": kept_config(config), "resumed": resumed})
        else:
            begin_run_file(config, folder)
    return finished


def _refuse_changes(
    config: RunConfig, phases: Sequence[Phase], former: dict[str, Any], folder: Path, finished: bool
) -> None:
    names_then = [phase["name"] for phase in former.get("phases", [])]
    if not names_then and (finished or complete_checkpoints(folder)):
        refuse_change("phases[0].name", phases[0].name, None, folder)
    begun = begun_phases(folder)
    if len(begun) > len(phases):
        raise UserError(
            "phases",
            f"are {len(phases)}, but {len(begun)} have begun in {str(folder)!r}; resume with all of them, or "
            "choose another output_path",
        )
    for index, path in enumerate(begun):
        name = phases[index].name
        if path.name != f"{index + 1}-{name}":
            refuse_change(f"phases[{index}].name", name, path.name.partition("-")[2], folder)
        for key, now, then in changes(phases[index].config, read_json(path / RUN)["config"]):
            if key != "model" or index == 0:
                refuse_change(_key(config, index, key), now, then, folder)
    shorter = min(len(phases), len(names_then))
    if len(phases) != len(names_then) and len(begun) >= shorter > 0 and (begun[shorter - 1] / RESULTS).exists():
        raise UserError(
            "phases",
            f"are {len(phases)}, but the run in {str(folder)!r} was started with {len(names_then)}, and its "
            f"student of {begun[shorter - 1].name} is saved already as that needs; resume with those, or start from "
            f"that student (model: {begun[shorter - 1]}) in another output_path",
        )


def _key(config: RunConfig, index: int, key: str) -> str:
    """Where in the YAML a key of a phase stands: in the phase, or at the top level."""
    return f"phases[{index}].{key}" if config.phases[index].names(key) else key


def _in_phase(config: RunConfig, index: int, error: UserError) -> UserError:
    """The error of a phase, with its key as it stands in the YAML."""
    key, separator, problem = str(error).partition(": ")
    named = separator and config.phases[index].names(key)
    return UserError(f"phases[{index}].{key}", f"{problem}" if named else f"{error} (phases[{index}])")


def _forget() -> None:
    """Give back what a phase held, and forget how accelerate was set up for it."""
    GradientState._reset_state()
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
