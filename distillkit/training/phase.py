"""One distillation from beginning to end; a run with phases makes one after another (`training.phases`).

convert (if asked for) → measure → train → save → measure → write. Each step leaves its result in the run's folder or
is checkpointed, so a run killed anywhere ends, after `--resume`, as if it had not been.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import torch
import transformers
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedModel, TrainingArguments, set_seed

from distillkit.config import RunConfig, RunEvaluationConfig, UserError
from distillkit.config.losses import ATTENTION_FUNCTIONS, HIDDEN_STATE_FUNCTIONS
from distillkit.console import say
from distillkit.data.signals import TensorRows
from distillkit.evaluation import Divergence, generate_samples, measure_divergence
from distillkit.evaluation.held_out import held_out_batches
from distillkit.losses import Objective
from distillkit.models.decoder import head
from distillkit.reporting import write_run_report
from distillkit.reporting.report import HTML
from distillkit.runs.checkpoints import flush_files
from distillkit.teacher.captured import CapturedTeacher
from distillkit.teacher.opening import open_background
from distillkit.teacher.signal import Teacher
from distillkit.training.arguments import (
    SAVE_MINUTES,
    StudentTechniques,
    build_training_arguments,
    saves_by_the_clock,
)
from distillkit.training.batches import Collator, padding_token
from distillkit.training.budget import set_steps
from distillkit.training.compilation import compiled_step
from distillkit.training.distiller import Distiller
from distillkit.training.embeddings import level_padding
from distillkit.training.interruption import EXIT_CODE, SaveRequests, any_rank
from distillkit.training.optimizers import OptimizerLine
from distillkit.training.origins import note_origins
from distillkit.training.precision import cast_for_saving, compute_dtype
from distillkit.training.processes import main_process_first
from distillkit.training.progress import MetricsFile, ProgressDisplay, finish_trackers
from distillkit.training.results import print_results, write_results
from distillkit.training.run_folder import RunFolder, open_run_folder
from distillkit.training.saving import save_student
from distillkit.training.setup import Models, load_models
from distillkit.training.text import PREPARED, HeldOut, load_text
from distillkit.training.trainer import DistillationTrainer
from distillkit.training.wiring import objective_of, online_teacher

Measurement = Callable[[], Divergence]


@dataclass(frozen=True)
class Place:
    """Which phase of a greater run a run is; by default it is all there is."""

    number: int = 1
    of: int = 1
    name: str = "training"

    @property
    def last(self) -> bool:
        return self.number == self.of

    def __str__(self) -> str:
        return self.name if self.of == 1 else f"phase {self.number} of {self.of}: {self.name}"


@dataclass(frozen=True)
class Run:
    """A run that has begun: what was asked for, and where and with what it is done."""

    config: RunConfig
    folder: RunFolder
    arguments: TrainingArguments
    techniques: StudentTechniques
    console: Console
    place: Place


def distill_once(
    config: RunConfig, console: Console, place: Place, check: Callable[[PreTrainedModel], None] | None = None
) -> None:
    """Run one distillation, whose student is then in `output_path`. A run that is finished already is left alone.

    check: is given the student before it is trained, and may raise UserError.

    Raises:
        UserError: something in the configuration cannot be; the line names the key.
        SystemExit: with code 130, after Ctrl-C or SIGTERM and a last checkpoint; with 1 or 2 on all processes but the
            first, which has raised the error.
    """
    run = _begin(config, console, place)
    if run.folder.finished:
        return
    models = load_models(config, run.folder, run.arguments, run.techniques, run.console)
    if check is not None:
        check(models.student)
    train_rows, held_out = load_text(config, run.folder, run.arguments, models)
    note_origins(config, run.folder)
    measure = _measurement(run, models, held_out)
    requests = SaveRequests(SAVE_MINUTES if saves_by_the_clock(config.training_args) else None)
    display = ProgressDisplay(run.console)
    trainer = _trainer(run, models, train_rows, held_out, measure)
    for callback in (requests, MetricsFile(run.folder.path), display, OptimizerLine(run.console)):
        trainer.add_callback(callback)

    say(run.console, f"{place} ({set_steps(trainer, train_rows, config.tokens, run.folder, run.console)})")
    before = _before(run, measure)
    try:
        _train(run, models, trainer)
    finally:
        requests.release()
        display.close()
    if requests.interrupted and trainer.state.global_step < trainer.state.max_steps:
        say(run.console, f"interrupted after step {trainer.state.global_step}, saved; go on with --resume")
        raise SystemExit(EXIT_CODE)
    _finish(run, models, trainer, measure, before)
    if any_rank(run.arguments, requests.interrupted)[0] and not place.last:
        say(run.console, f"interrupted after {place}, which is finished; go on with --resume")
        raise SystemExit(EXIT_CODE)


def _begin(config: RunConfig, console: Console, place: Place) -> Run:
    """Read the training arguments, which set up the devices and processes, and open the run's folder."""
    functions = {loss.function for loss in config.loss_functions}
    # Hidden states alone leave the head without a gradient; what attention outputs alone do not reach is frozen.
    uses_logits = not functions & {*HIDDEN_STATE_FUNCTIONS} or bool(
        functions - {*HIDDEN_STATE_FUNCTIONS, *ATTENTION_FUNCTIONS}
    )
    path = Path(config.output_path)
    arguments, techniques = build_training_arguments(
        config.training_args, path, uses_logits=uses_logits, project_name=config.project_name
    )
    console.quiet = console.quiet or arguments.process_index > 0
    os.environ.setdefault("WANDB_PROJECT", config.project_name)
    transformers.utils.logging.disable_progress_bar()
    if not console.is_terminal:
        datasets.disable_progress_bars()
    if arguments.n_gpu > 1:
        say(console, f"one of {arguments.n_gpu} GPUs is used; start with torchrun --nproc-per-node gpu for all of them")
        arguments._n_gpu = 1
    folder = _open(config, arguments, place)
    what = "this run" if place.of == 1 else str(place)
    if folder.finished:
        say(console, f"{path}: {what} is finished already, nothing is left to do")
        if folder.main_process and not (path / HTML).exists():  # it was killed meanwhile
            say(console, write_run_report(path))
        return Run(config, folder, arguments, techniques, console, place)
    if place.of > 1:
        say(console, what)
    if folder.checkpoint is not None:
        say(console, f"resuming after step {folder.checkpoint.step}")
    elif config.resume:
        say(console, f"{path}: no checkpoint to resume from, the run starts from the beginning")
    set_seed(arguments.seed)
    return Run(config, folder, arguments, techniques, console, place)


def _open(config: RunConfig, arguments: TrainingArguments, place: Place) -> RunFolder:
    derived = ("model",) if place.number > 1 else ()  # the folder of the phase before
    main_process = arguments.process_index == 0
    return main_process_first(arguments, lambda: open_run_folder(config, main_process=main_process, derived=derived))


def _measurement(run: Run, models: Models, held_out: HeldOut | None) -> Measurement | None:
    """Measures the student as it is when called; None without held-out text."""
    if held_out is None:
        return None
    settings = run.config.evaluation or RunEvaluationConfig()

    def measure() -> Divergence:
        batch_size = run.arguments.per_device_train_batch_size
        return measure_divergence(
            held_out.teacher,
            models.student,
            held_out_batches(held_out.rows, batch_size, signal_columns=held_out.signal_columns),
            num_tokens=settings.num_tokens,
            vocabulary_size=models.vocabulary_size,
            student_autocast=compute_dtype(run.arguments),
        )

    return measure


def _trainer(
    run: Run, models: Models, train_rows: Dataset, held_out: HeldOut | None, measure: Measurement | None
) -> DistillationTrainer:
    config = run.config
    live = None if isinstance(models.teacher, CapturedTeacher) else models.teacher
    objective = objective_of(config, models.student, live, models.vocabulary_size)
    asked = _teacher(config, models, objective)
    signal_columns = models.teacher.columns if isinstance(models.teacher, CapturedTeacher) else ()
    return DistillationTrainer(
        Distiller(models.student, objective),
        asked if objective.needs_teacher else None,
        weights_dtype=compute_dtype(run.arguments),
        divergence=measure,
        args=run.arguments,
        train_dataset=TensorRows(train_rows, signal_columns),
        eval_dataset=None if held_out is None else held_out.rows,
        data_collator=Collator(
            padding_token(models.tokenizer, models.vocabulary_size), config.sequence_length, signal_columns
        ),
        processing_class=models.tokenizer,
    )


def _teacher(config: RunConfig, models: Models, objective: Objective) -> Teacher:
    """Who is asked about batches, with the background distribution where a loss wants one."""
    positions = [
        position
        for position, loss in enumerate(config.loss_functions)
        if loss.missing_probability_handling == "background"
    ]
    if isinstance(models.teacher, CapturedTeacher):
        if positions and models.teacher.background is None:
            raise UserError(
                f"loss_functions[{positions[0]}].missing_probability_handling",
                "background needs teacher.background, for dataset.train_dataset has none",
            )
        return models.teacher
    assert config.teacher.kind == "hf"
    wanted = config.teacher.background if positions else None
    background = None if wanted is None else open_background(wanted, len(head(models.teacher)[0]))
    return online_teacher(config, models.teacher, objective, models.vocabulary_size, background)


def _before(run: Run, measure: Measurement | None) -> Divergence | None:
    """The untrained student's divergence: measured once, and kept for when the run is resumed."""
    if measure is None or run.config.evaluation is None:
        return None
    if (noted := run.folder.noted("divergence_before")) is not None:
        return Divergence(**noted)
    if run.folder.checkpoint is not None:
        return None
    before = measure()
    run.folder.note("divergence_before", asdict(before))
    return before


def _train(run: Run, models: Models, trainer: DistillationTrainer) -> None:
    """All steps that are left; none where the checkpoint was the last of its run."""
    checkpoint = run.folder.checkpoint
    if checkpoint is not None and checkpoint.reached_the_end():
        return
    teacher = None if isinstance(models.teacher, CapturedTeacher) else models.teacher
    with compiled_step(models.student, teacher, trainer.model.objective, run.techniques.compilation):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.path))


def _finish(
    run: Run, models: Models, trainer: DistillationTrainer, measure: Measurement | None, before: Divergence | None
) -> None:
    """Save the student, measure it as saved, let it write, and say how the run ended.

    A student with which another phase goes on keeps its float32 masters, so that phases round nothing.
    """
    folder, evaluation = run.folder, run.config.evaluation
    if run.place.last:
        cast_for_saving(models.student, trainer.weights_dtype)
    if run.config.resize_embeddings_to_multiple_of is not None:
        level_padding(models.student, models.embedding_rows)
    if folder.main_process:
        save_student(models.student, folder.path, trainer.weights_dtype)
        models.tokenizer.save_pretrained(folder.path)
        flush_files(folder.path.iterdir())
    after = measure() if measure is not None and evaluation is not None else None
    trainer.accelerator.wait_for_everyone()  # until nobody reads the prepared rows
    if folder.main_process:
        shutil.rmtree(folder.path / PREPARED, ignore_errors=True)
        samples = []
        if evaluation is not None:
            settings = evaluation.model_dump(include={"max_new_tokens", "temperature", "top_p", "seed"})
            dtype = trainer.weights_dtype  # float32 masters stand beside frozen 16-bit weights between phases
            with torch.autocast(run.arguments.device.type, dtype=dtype, enabled=dtype != torch.float32):
                samples = generate_samples(models.student, models.tokenizer, evaluation.prompts, **settings)
        results = write_results(run.config, folder, models.freezing, before, after, samples, run.arguments.device)
        print_results(run.console, results, before, after)
        say(run.console, f"the student is in {folder.path}")
        say(run.console, write_run_report(folder.path))
    finish_trackers(run.arguments)
