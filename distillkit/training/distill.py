"""`distillkit CONFIG.yaml`: one distillation from beginning to end.

convert (if asked for) → measure → train → save → measure → write. The steps are idempotent or checkpointed, so that a
run killed anywhere ends, after `--resume`, as if it had not been.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import datasets
import torch
import transformers
from datasets import Dataset
from rich.console import Console
from transformers import set_seed

from distillkit.config import EvaluationConfig, RunConfig, UserError
from distillkit.config.losses import HIDDEN_STATE_FUNCTIONS
from distillkit.data import build_datasets
from distillkit.evaluation import Divergence, generate_samples, measure_divergence
from distillkit.evaluation.evaluate import held_out_batches
from distillkit.losses import ModelShape, Objective
from distillkit.teacher.online import OnlineTeacher
from distillkit.training.arguments import SAVE_MINUTES, build_training_arguments, saves_by_the_clock
from distillkit.training.batches import Collator, padding_token
from distillkit.training.distiller import Distiller
from distillkit.training.interruption import EXIT_CODE, SaveRequests
from distillkit.training.models import Models, load_models
from distillkit.training.precision import cast_for_saving, compiled_layers, compute_dtype
from distillkit.training.progress import MetricsFile, ProgressDisplay
from distillkit.training.results import print_results, write_results
from distillkit.training.run_folder import RunFolder, open_run_folder
from distillkit.training.saving import save_student
from distillkit.training.trainer import DistillationTrainer


def distill(config: RunConfig, console: Console | None = None) -> Path:
    """Run a distillation and return the folder of the trained student, which is `output_path`.

    Raises:
        UserError: something in the configuration cannot be; the line names the key.
        SystemExit: with code 130, after Ctrl-C or SIGTERM and a last checkpoint.
    """
    uses_logits = any(loss.function not in HIDDEN_STATE_FUNCTIONS for loss in config.loss_functions)
    arguments, techniques = build_training_arguments(
        config.training_args, Path(config.output_path), uses_logits=uses_logits
    )
    console = console or Console()
    console.quiet = console.quiet or arguments.process_index > 0
    os.environ.setdefault("WANDB_PROJECT", config.project_name)
    transformers.utils.logging.disable_progress_bar()
    if not console.is_terminal:
        datasets.disable_progress_bars()

    with arguments.main_process_first():
        folder = open_run_folder(config, main_process=arguments.process_index == 0)
    if folder.finished:
        console.print(f"{folder.path}: this run is finished already, nothing is left to do", highlight=False)
        return folder.path
    if config.resume and folder.checkpoint is None:
        console.print(
            f"{folder.path}: no checkpoint to resume from, the run starts from the beginning", highlight=False
        )
    set_seed(arguments.seed)
    models = load_models(config, folder, arguments, techniques, console)
    with arguments.main_process_first():
        train_rows, held_out = build_datasets(
            config.dataset,
            models.tokenizer,
            config.sequence_length,
            config.evaluation.dataset if config.evaluation is not None else None,
        )
    measure = _measurement(config, models, held_out, compute_dtype(arguments), arguments.per_device_train_batch_size)
    if arguments.eval_strategy != "no" and measure is None:
        raise UserError("training_args.eval_strategy: there is no held-out text; name it in dataset.eval_dataset")

    requests = SaveRequests(SAVE_MINUTES if saves_by_the_clock(config.training_args) else None)
    display = ProgressDisplay(console)
    objective = _objective(config, models)
    trainer = DistillationTrainer(
        Distiller(models.student, objective),
        _teacher(config, models, objective),
        weights_dtype=compute_dtype(arguments),
        divergence=measure,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=held_out,
        data_collator=Collator(padding_token(models.tokenizer), config.sequence_length),
        processing_class=models.tokenizer,
        callbacks=[requests, MetricsFile(folder.path), display],
    )
    before = _before(config, folder, measure)
    if folder.checkpoint is None or not folder.checkpoint.reached_the_end():
        compiled = compiled_layers(models.student, techniques.torch_compile_backend, techniques.torch_compile_mode)
        try:
            with compiled if techniques.torch_compile else nullcontext():
                trainer.train(resume_from_checkpoint=folder.checkpoint and str(folder.checkpoint.path))
        finally:
            requests.release()
            display.close()
    if requests.interrupted:
        console.print(
            f"interrupted after step {trainer.state.global_step}, saved; go on with --resume", highlight=False
        )
        raise SystemExit(EXIT_CODE)
    _finish(config, folder, models, trainer, measure, before, console)
    return folder.path


def _objective(config: RunConfig, models: Models) -> Objective:
    student, teacher = (
        ModelShape(model.config.hidden_size, model.config.num_hidden_layers)
        for model in (models.student, models.teacher)
    )
    return Objective(
        config.loss_functions,
        config.layer_mapping,
        student,
        teacher,
        force_hidden_state_projection=config.force_hidden_state_projection,
        vocabulary_size=models.vocabulary_size,
    )


def _teacher(config: RunConfig, models: Models, objective: Objective) -> OnlineTeacher | None:
    if not objective.needs_teacher:
        return None
    assert config.teacher.kind == "hf"
    return OnlineTeacher(
        models.teacher,
        objective.teacher_layers,
        final_norm=objective.taps_final_norm,
        top_k=config.teacher.top_k,
        vocabulary_size=models.vocabulary_size,
    )


def _measurement(
    config: RunConfig, models: Models, held_out: Dataset | None, dtype: torch.dtype, batch_size: int
) -> Callable[[], Divergence] | None:
    """Measures the student as it is when called; None without held-out text."""
    if held_out is None:
        if config.evaluation is not None and not config.evaluation.prompts:
            raise UserError("evaluation.dataset: is missing: name held-out text here or in dataset.eval_dataset")
        return None
    settings = config.evaluation or EvaluationConfig()

    def measure() -> Divergence:
        return measure_divergence(
            models.teacher,
            models.student,
            held_out_batches(held_out, batch_size),
            num_tokens=settings.num_tokens,
            vocabulary_size=models.vocabulary_size,
            student_autocast=dtype,
        )

    return measure


def _before(config: RunConfig, folder: RunFolder, measure: Callable[[], Divergence] | None) -> Divergence | None:
    """The untrained student's divergence: measured once, and kept for when the run is resumed."""
    if measure is None or config.evaluation is None:
        return None
    if (noted := folder.noted("divergence_before")) is not None:
        return Divergence(**noted)
    if folder.checkpoint is not None:
        return None
    before = measure()
    folder.note("divergence_before", before.as_metrics())
    return before


def _finish(
    config: RunConfig,
    folder: RunFolder,
    models: Models,
    trainer: DistillationTrainer,
    measure: Callable[[], Divergence] | None,
    before: Divergence | None,
    console: Console,
) -> None:
    """Save the student, measure it as saved, let it write, and say how the run ended."""
    cast_for_saving(models.student, trainer.weights_dtype)
    main_process = trainer.is_world_process_zero()
    if main_process:
        save_student(models.student, folder.path, trainer.weights_dtype)
        models.tokenizer.save_pretrained(folder.path)
    after = measure() if measure is not None and config.evaluation is not None else None
    if main_process:
        samples = []
        if config.evaluation is not None:
            wanted = config.evaluation.model_dump(include={"max_new_tokens", "temperature", "top_p", "seed"})
            samples = generate_samples(models.student, models.tokenizer, config.evaluation.prompts, **wanted)
        results = write_results(config, folder, models.freezing, before, after, samples, trainer.args.device)
        print_results(console, results, before, after)
        console.print(f"the student is in {folder.path}", highlight=False)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()
