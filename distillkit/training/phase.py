"""One phase of a run, from beginning to end.

convert (where the run asks for it) → measure → train → save → measure → write. Each step leaves its result in the
phase's folder or is checkpointed, so a phase killed anywhere ends, after `--resume`, as if it had not been.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeVar

import datasets
import torch
import transformers
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from distillkit.config import Phase, Run, RunEvaluationConfig
from distillkit.console import INTERRUPTED, print_line
from distillkit.data.dataset import TokenisedTexts
from distillkit.data.signals import TensorRows
from distillkit.evaluation import Divergence, Sample, generate_samples, measure_divergence
from distillkit.evaluation.held_out import held_out_batches
from distillkit.models.float8 import frozen_in_float8
from distillkit.reporting import write_run_report
from distillkit.runs.checkpoints import flush_files
from distillkit.runs.clock import (
    EVALUATION,
    FILES,
    FIRST_STEPS,
    MODELS,
    REPORT,
    SAMPLES,
    SAVING,
    TEXT,
    Clock,
    clock_text,
)
from distillkit.runs.fingerprints import fingerprint
from distillkit.runs.folder import PhaseFolder, open_phase
from distillkit.runs.names import HTML, PREPARED
from distillkit.training.arguments import SAVE_MINUTES, Arguments, saves_by_the_clock
from distillkit.training.batches import Collator, padding_token
from distillkit.training.budget import set_steps
from distillkit.training.compilation import compiled_step
from distillkit.training.display import FirstSteps, MetricsFile, ProgressDisplay, finish_trackers
from distillkit.training.distiller import Distiller
from distillkit.training.divided_checkpoints import writes_in_background
from distillkit.training.embeddings import level_padding
from distillkit.training.interruption import SaveRequests
from distillkit.training.lora import merge_adapter, save_adapter
from distillkit.training.optimizers import OptimizerLine
from distillkit.training.origins import settle_files, settle_models
from distillkit.training.parallel import any_process, is_divided, main_process_first, whole_state, within
from distillkit.training.precision import cast_for_saving, cast_state, compute_dtype
from distillkit.training.results import print_results, write_phase_results
from distillkit.training.rollouts import open_rollouts
from distillkit.training.saving import check_room, save_student, student_files
from distillkit.training.setup import Models, build_distiller, load_models
from distillkit.training.text import HeldOut, load_text
from distillkit.training.trainer import DistillationTrainer
from distillkit.training.wiring import signal_request

Measurement = Callable[[], Divergence]
Result = TypeVar("Result")


@dataclass(frozen=True)
class PhaseContext:
    """A phase that has begun: its configuration, and where and with what it is trained."""

    phase: Phase
    folder: PhaseFolder
    arguments: Arguments
    console: Console
    clock: Clock


def train_phase(
    run: Run,
    phase: Phase,
    arguments: Arguments,
    console: Console,
    clock: Clock,
    tokenised: TokenisedTexts | None,
    check: Callable[[PreTrainedModel, PreTrainedTokenizerBase], None],
) -> None:
    """Train one phase, whose student is then in its folder. A phase that is finished already is left alone.

    tokenised: keeps documents for the phases that come.
    check: is given the student before it is trained, and its tokenizer, and may raise UserError.

    Raises:
        UserError: something in the configuration cannot be; the line names the key.
        SystemExit: with code 130, after Ctrl-C or SIGTERM and a last checkpoint.
    """
    context = _begin(run, phase, arguments, console, clock)
    if context.folder.finished:
        return
    config, folder = phase.config, context.folder
    with clock.span(FILES):
        main_process_first(arguments.trainer, lambda: settle_files(phase, folder))
    with clock.span(MODELS):
        models = load_models(config, folder, arguments, console, clock)
    check(models.student, models.tokenizer)
    with clock.span(FILES):
        main_process_first(arguments.trainer, lambda: settle_models(config, folder, models))
    with clock.span(MODELS):
        distiller = build_distiller(config, models, arguments.trainer)
    with clock.span(TEXT):
        train_rows, held_out = load_text(config, folder, arguments.trainer, models, tokenised)
    measure = _measurement(context, models, distiller, held_out)
    by_the_clock = saves_by_the_clock(config.training_args)
    requests = SaveRequests(SAVE_MINUTES if by_the_clock else None)
    display = ProgressDisplay(console)
    trainer = _trainer(context, models, distiller, train_rows, held_out, measure)
    for callback in (requests, MetricsFile(folder.path), display, OptimizerLine(console), FirstSteps(clock)):
        trainer.add_callback(callback)

    with clock.span(TEXT):
        schedule = set_steps(trainer, train_rows, config.tokens, folder, console)
    saved_dtype = trainer.weights_dtype if phase.is_last else torch.float32
    checkpoints = (schedule.steps, by_the_clock, saved_dtype, models.adapter is not None)
    main_process_first(arguments.trainer, lambda: check_room(models.student, arguments.trainer, folder, *checkpoints))
    print_line(console, f"{phase} ({schedule})")
    before = _divergence_before(context, measure)
    try:
        _train(context, models, trainer)
    finally:
        requests.release()
        display.close()
    if requests.interrupted and trainer.state.global_step < trainer.state.max_steps:
        print_line(console, f"interrupted after step {trainer.state.global_step}, saved; go on with --resume")
        raise SystemExit(INTERRUPTED)
    _finish(context, models, trainer, measure, before)
    if any_process(arguments.trainer, requests.interrupted)[0] and not phase.is_last:
        print_line(console, f"interrupted after {phase}, which is finished; go on with --resume")
        raise SystemExit(INTERRUPTED)


def _begin(run: Run, phase: Phase, arguments: Arguments, console: Console, clock: Clock) -> PhaseContext:
    """Open the phase's folder, and set what holds for the whole process."""
    trainer = arguments.trainer
    os.environ.setdefault("WANDB_PROJECT", phase.config.project_name)
    transformers.utils.logging.disable_progress_bar()
    if not console.is_terminal:
        datasets.disable_progress_bars()
    if trainer.n_gpu > 1:
        if getattr(phase.config.teacher, "devices", None) is None:
            print_line(
                console,
                f"one of {trainer.n_gpu} GPUs is used; start with torchrun --nproc-per-node gpu for all of them",
            )
        trainer._n_gpu = 1
    main_process = trainer.process_index == 0

    def opened() -> PhaseFolder:
        return open_phase(
            phase, resume=run.config.resume, main_process=main_process, say=lambda line: print_line(console, line)
        )

    folder = main_process_first(trainer, opened)
    if folder.finished:
        print_line(console, f"{folder.path}: {phase} is finished already, nothing is left to do")
        if main_process and not (folder.path / HTML).exists():  # it was killed meanwhile
            print_line(console, write_run_report(folder.path))
        return PhaseContext(phase, folder, arguments, console, clock)
    if run.has_phase_folders:
        print_line(console, str(phase))
    if folder.checkpoint is not None:
        print_line(console, f"resuming after step {folder.checkpoint.step}; {folder.checkpoint.checked_by()}")
    elif run.config.resume and not (run.has_phase_folders and phase.index > 0):
        print_line(console, f"{folder.path}: no checkpoint to resume from, the run starts from the beginning")
    set_seed(trainer.seed)
    return PhaseContext(phase, folder, arguments, console, clock)


def _measurement(
    context: PhaseContext, models: Models, distiller: Distiller, held_out: HeldOut | None
) -> Measurement | None:
    """Measures the student as it is when called; None without held-out text."""
    if held_out is None:
        return None
    settings = context.phase.config.evaluation or RunEvaluationConfig()
    trainer = context.arguments.trainer

    def measured() -> Divergence:
        return measure_divergence(
            held_out.teacher,
            models.student,
            held_out_batches(held_out.rows, trainer.per_device_train_batch_size, held_out.teacher),
            num_tokens=settings.num_tokens,
            vocabulary_size=models.vocabulary_size,
            student_autocast=compute_dtype(trainer),
            context=models.context,
        )

    return lambda: within(distiller, measured)


def _trainer(
    context: PhaseContext,
    models: Models,
    distiller: Distiller,
    train_rows: Dataset,
    held_out: HeldOut | None,
    measure: Measurement | None,
) -> DistillationTrainer:
    config, teacher = context.phase.config, models.teacher
    arguments = context.arguments.trainer
    top_k = config.teacher.top_k if config.teacher.kind == "hf" else None
    objective = distiller.objective
    return DistillationTrainer(
        distiller,
        teacher if objective.needs_teacher else None,
        signal_request(objective, top_k=top_k, vocabulary_size=models.vocabulary_size),
        weights_dtype=compute_dtype(arguments),
        divergence=measure,
        context=models.context,
        rollouts=open_rollouts(config, models, arguments),
        adapter=models.adapter,
        clock=context.clock,
        async_checkpoints=writes_in_background(config.parallel, arguments),
        args=arguments,
        train_dataset=TensorRows(train_rows, teacher.columns),
        eval_dataset=None if held_out is None else held_out.rows,
        data_collator=Collator(
            padding_token(models.tokenizer, models.vocabulary_size),
            config.sequence_length,
            teacher.columns,
            teacher.prepare,
        ),
        processing_class=models.tokenizer,
    )


def _divergence_before(context: PhaseContext, measure: Measurement | None) -> Divergence | None:
    """The untrained student's divergence: measured once, and kept for when the run is resumed."""
    folder = context.folder
    if measure is None or context.phase.config.evaluation is None:
        return None
    if (kept := folder.record.divergence_before) is not None:
        return Divergence(**kept)
    if folder.checkpoint is not None:
        return None
    with context.clock.span(EVALUATION):
        before = measure()
    folder.update_record(divergence_before=asdict(before))
    return before


def _train(context: PhaseContext, models: Models, trainer: DistillationTrainer) -> None:
    """All steps that are left; none where the checkpoint was the last of its run."""
    checkpoint = context.folder.checkpoint
    if checkpoint is not None and checkpoint.reached_the_end():
        return
    compilation = context.arguments.techniques.compilation
    float8 = context.phase.config.frozen_precision is not None
    say = partial(print_line, context.console)
    frozen = frozen_in_float8(models.student, say) if float8 else nullcontext()
    compiled = compiled_step(models.student, models.teacher.model, trainer.model.objective, compilation)
    with frozen, compiled, context.clock.span(FIRST_STEPS):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.path))


def _finish(
    context: PhaseContext,
    models: Models,
    trainer: DistillationTrainer,
    measure: Measurement | None,
    before: Divergence | None,
) -> None:
    """Save the student, measure it as saved, generate samples, and write the results."""
    folder, config, console, clock = context.folder, context.phase.config, context.console, context.clock
    arguments = context.arguments.trainer
    with clock.span(SAVING):
        _save(context, models, trainer)
    after = None
    if measure is not None and config.evaluation is not None:
        with clock.span(EVALUATION):
            after = _or_line(console, "the student could not be measured", measure)
    samples: list[Sample] | None = None
    if folder.main_process or is_divided(models.student):
        with clock.span(SAMPLES):
            samples = _or_line(console, "there are no samples", lambda: _samples(context, models, trainer))
    trainer.accelerator.wait_for_everyone()  # until nobody reads the prepared rows
    if folder.main_process:
        shutil.rmtree(folder.path / PREPARED, ignore_errors=True)
        results = write_phase_results(
            context.phase, folder.path, models.freezing, before, after, samples or [], clock.lap(), arguments.device
        )
        print_results(console, results)
        if context.phase.changes is not None:
            print_line(console, f"time of {context.phase.name}: {clock_text(results['clock'])}")
        print_line(console, f"the student is in {folder.path}")
        with clock.span(REPORT):
            print_line(console, write_run_report(folder.path))
    finish_trackers(arguments)


def _save(context: PhaseContext, models: Models, trainer: DistillationTrainer) -> None:
    """A student with which another phase goes on keeps its float32 masters, so that phases round nothing."""
    folder = context.folder
    if models.adapter is not None:
        if folder.main_process:
            save_adapter(models.adapter, folder.path)
        merge_adapter(models.adapter)
    if context.phase.is_last:
        cast_for_saving(models.student, trainer.weights_dtype)
    if context.phase.config.resize_embeddings_to_multiple_of is not None:
        level_padding(models.student, models.embedding_rows)
    state = whole_state(models.student)
    if context.phase.is_last:
        state = cast_state(models.student, state, trainer.weights_dtype)
    if folder.main_process:
        save_student(models.student, folder.path, trainer.weights_dtype, state)
        models.tokenizer.save_pretrained(folder.path)
        flush_files(folder.path.iterdir())
        folder.update_record(saved=fingerprint(student_files(folder.path), limit=None))


def _samples(context: PhaseContext, models: Models, trainer: DistillationTrainer) -> list[Sample]:
    evaluation = context.phase.config.evaluation
    if evaluation is None:
        return []
    settings = evaluation.model_dump(include={"max_new_tokens", "temperature", "top_p", "seed"})
    dtype = trainer.weights_dtype  # float32 masters stand beside frozen 16-bit weights between phases
    with torch.autocast(context.arguments.trainer.device.type, dtype=dtype, enabled=dtype != torch.float32):
        return within(
            trainer.model, lambda: generate_samples(models.student, models.tokenizer, evaluation.prompts, **settings)
        )


def _or_line(console: Console, what: str, work: Callable[[], Result]) -> Result | None:
    """What `work` returns; where it fails, a line: it must not cost a student that is trained its results."""
    try:
        return work()
    except Exception as error:
        print_line(console, f"{what}: {type(error).__name__}: {' '.join(str(error).split())}")
        return None
