"""`distillkit CONFIG.yaml`: the phases of a run, one after another, each from the student of the one before.

Every phase leaves a record, metrics, checkpoints and a loadable student in its folder. Only files connect phases, so a
run killed anywhere resumes with the phase that has no results yet, and ends as if it had not been killed. Where phases
have folders of their own, the last one's student is then put into `output_path`, and `results.json` last.
"""

import gc
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from accelerate.state import GradientState, PartialState
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distillkit.config import Phase, Run
from distillkit.config.readiness import check_processes, check_ready
from distillkit.config.resolve import AnyRun, as_run
from distillkit.console import INTERRUPTED, print_line, sigterm_as_ctrl_c
from distillkit.data.dataset import TokenisedTexts
from distillkit.evaluation import check_prompts
from distillkit.losses import check_losses
from distillkit.models.float8 import check_float8
from distillkit.models.gguf_files import gguf_parsed_once
from distillkit.reporting import write_run_report
from distillkit.runs.clock import REPORT, Clock, clock_record, clock_text
from distillkit.runs.folder import open_run, refuse_foreign_files
from distillkit.runs.lock import locked
from distillkit.runs.names import HTML
from distillkit.runs.writing import full_disk_errors
from distillkit.training.arguments import Arguments, build_arguments
from distillkit.training.freezing import check_frozen
from distillkit.training.hub import check_token, push
from distillkit.training.origins import check_saved
from distillkit.training.parallel import main_process_first
from distillkit.training.phase import train_phase
from distillkit.training.results import print_results, write_run_results
from distillkit.training.rollouts import prompts_of
from distillkit.training.saving import link_student


def distill(
    run: AnyRun,
    console: Console | None = None,
    *,
    overrides: Sequence[str] = (),
    clock: Clock | None = None,
) -> Path:
    """Run a distillation and return the folder of the trained student, which is `output_path`.

    run: the path of a YAML file, its content as a mapping, or a configuration.
    overrides: `key=value`, as on the command line; for a path.
    clock: that of the command; a new one by default.

    Raises:
        UserError: something in the configuration cannot be; the line names the key.
        SystemExit: with code 130, after Ctrl-C or SIGTERM and a last checkpoint; with 1 or 2 on all processes but the
            first, which has raised the error.
    """
    run = as_run(run, overrides)
    console = console or Console()
    check_ready(run)
    check_processes(run)
    _check_losses(run)
    check_token(run.config)
    remedy = "free some space, and go on with --resume"
    try:
        with full_disk_errors(lambda: f"at {str(run.folder)!r}; {remedy}"), sigterm_as_ctrl_c(), ExitStack() as lock:
            _train(run, console, lock, clock or Clock())
            main_process = PartialState().is_main_process
            PartialState().destroy_process_group()
            if main_process:
                push(run.config, console)
    except KeyboardInterrupt:  # while nothing is trained
        print_line(console, "interrupted; go on with --resume")
        raise SystemExit(INTERRUPTED) from None
    return run.folder


@gguf_parsed_once()
def _train(run: Run, console: Console, lock: ExitStack, clock: Clock) -> None:
    """All phases that are left, and then the results of the whole. lock: holds that of the run's folder."""
    build = partial(_build, fp32_precision=torch.backends.fp32_precision)  # type: ignore[attr-defined]  # set from C
    # What is wrong in a later phase is refused now. The first one's come last, for they set up what is global.
    for phase in reversed(run.phases):
        arguments = build(phase)
    main_process = arguments.trainer.process_index == 0
    console.quiet = console.quiet or not main_process

    def opened() -> bool:
        refuse_foreign_files(run.folder)  # before anything is written there
        if main_process:
            lock.enter_context(locked(run.folder))
        return open_run(run, main_process=main_process)

    if main_process_first(arguments.trainer, opened):
        print_line(console, f"{run.folder}: this run is finished already, nothing is left to do")
        if main_process and not (run.folder / HTML).exists():  # it was killed meanwhile
            print_line(console, write_run_report(run.folder))
        return
    tokenised = TokenisedTexts() if len(run.phases) > 1 else None
    for phase in run.phases:
        if phase.index > 0:
            _forget()
            arguments = build(phase)
        with phase.locating():
            train_phase(run, phase, arguments, console, clock, tokenised, partial(_check_ahead, run, phase))
    if run.has_phase_folders and main_process:
        last = run.phases[-1].folder
        check_saved(last)
        link_student(last, run.folder)
        print_results(console, write_run_results(run, clock))
        print_line(console, f"the student is in {run.folder}")
        with clock.span(REPORT):
            print_line(console, write_run_report(run.folder))
    print_line(console, f"time: {clock_text(clock_record(clock.seconds()))}")
    PartialState().wait_for_everyone()


def _check_losses(run: Run) -> None:
    """Raises `UserError` where a loss from a module cannot be called: now, not when its phase begins."""
    for phase in run.phases:
        with phase.locating():
            check_losses(phase.config.loss_functions)


def _build(phase: Phase, fp32_precision: str) -> Arguments:
    """The arguments of a phase. Each time this sets up processes and precision for all that follows.

    fp32_precision: PyTorch's own, for tf32 is of the phase alone that names it.
    """
    torch.backends.fp32_precision = fp32_precision  # type: ignore[attr-defined]
    with phase.locating():
        return build_arguments(phase.config)


def _check_ahead(run: Run, phase: Phase, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `UserError` where this phase or a later one asks for a continuation of nothing, or a later one freezes
    what the student does not have, or wants float8 that is not: now, not when its turn comes.
    """
    for later in run.phases[phase.index :]:
        with later.locating():
            if later.config.evaluation is not None:
                check_prompts(tokenizer, later.config.evaluation.prompts)
            if later is not phase:
                if later.config.rollouts is not None:
                    prompts_of(later.config, tokenizer)
                check_frozen(student, later.config.frozen_res, later.config.frozen_modules)
                for key, remedy in later.config.in_float8.items():
                    check_float8(student.device, key, remedy)


def _forget() -> None:
    """Free what a phase held, and forget how accelerate was set up for it."""
    GradientState._reset_state()
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
