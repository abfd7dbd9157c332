"""What is doubtful about a run before it starts: one line each, with the key, the problem and the remedy."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from distillkit.config import Run, RunConfig, UserError
from distillkit.config.losses import ATTENTION_FUNCTIONS
from distillkit.config.parallel import DIVIDED
from distillkit.config.readiness import check_ready
from distillkit.formatting import GIB, token_text
from distillkit.models.decoder import head
from distillkit.planning.gpus import GPU
from distillkit.planning.result import PhasePlan, RunPlan
from distillkit.planning.settings import Settings
from distillkit.planning.tokens import Schedule
from distillkit.student.mixers.names import FULL
from distillkit.training.optimizers import LOSSY_ADDENDS

LONG = 16384
"""Tokens per row from which activations without checkpointing are more than weights."""

SMALLEST_BF16_RATE = 5e-6
"""AdamW moves a weight by about the learning rate. The bf16 neighbours of a weight of 0.02 are 1.2e-4 away, so at this
rate it is rounded to one of them in one step of 24, and what the step meant is mostly noise."""


def about_run(
    run: Run,
    plan: RunPlan,
    teacher: PreTrainedConfig | None,
    teacher_dtype: torch.dtype | None,
    student: PreTrainedConfig,
) -> tuple[list[str], list[str]]:
    """(errors, warnings) about a run as a whole. teacher, teacher_dtype: None where it runs elsewhere."""
    errors = []
    try:
        check_ready(run)
    except UserError as error:
        errors.append(str(error))
    phases = [phase.config for phase in run.phases]
    warnings = [
        *_about_places(run.config, plan),
        *_about_teacher(teacher, teacher_dtype, student, getattr(run.config.teacher, "tokenizer", None)),
        *_about_server(phases),
        *_about_order(phases),
        *_about_lengths(phases, teacher, student),
    ]
    return errors, [str(warning) for warning in warnings]


def _about_places(config: RunConfig, plan: RunPlan) -> Iterator[UserError]:
    output = Path(config.output_path).expanduser()
    if output.is_dir() and any(output.iterdir()) and not config.resume:
        yield UserError(
            "output_path",
            f"{config.output_path!r} exists and is not empty; use --resume to continue it, or another folder",
        )
    parent = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if plan.disk_peak > free:
        yield UserError(
            "output_path",
            f"needs {plan.disk_peak / GIB:.0f} GiB, and {free / GIB:.0f} GiB are free there; name "
            "another, or lower training_args.save_total_limit",
        )
    settings = Settings.of(config)
    if settings.push_to_hub and settings.hub_model_id is None:
        yield UserError(
            "training_args.hub_model_id", f"is missing, push_to_hub would make one named {output.name!r}; name it"
        )


def _about_held_out_text(config: RunConfig) -> Iterator[UserError]:
    held_out, _ = config.held_out_text
    if held_out is None:
        yield UserError(
            "dataset.eval_dataset",
            "there is no held-out text, so the distance from student to teacher is not measured; name some",
        )
    elif held_out == config.dataset.train_dataset:
        yield UserError("dataset.eval_dataset", "is the training text; name text that is held out")
    elif config.evaluation is None and config.training_args.get("eval_strategy", "no") == "no":
        yield UserError(
            "evaluation", "is missing, so the held-out text is not measured on; give evaluation, or eval_strategy"
        )


def _about_server(phases: list[RunConfig]) -> Iterator[UserError]:
    if any(config.teacher.kind == "server" for config in phases):
        yield UserError(
            "teacher.url",
            "the server is not asked by a plan: times are those of the student, if the server keeps pace with it",
        )


def _about_teacher(
    teacher: PreTrainedConfig | None,
    teacher_dtype: torch.dtype | None,
    student: PreTrainedConfig,
    tokenizer: str | None,
) -> Iterator[UserError]:
    if teacher is None:
        return
    if teacher_dtype == torch.float32:
        yield UserError(
            "teacher.kwargs.dtype",
            "the teacher is loaded in float32, at twice the memory and a fraction of the speed; set dtype: bfloat16",
        )
    if tokenizer is None and teacher.vocab_size != student.vocab_size:
        yield UserError(
            "model",
            f"has {student.vocab_size:,} rows of embeddings, the teacher {teacher.vocab_size:,}; losses compare "
            "the tokens that both have; check that the tokenizers are the same",
        )


def _about_order(phases: list[RunConfig]) -> Iterator[UserError]:
    aligns = [any(loss.function in ATTENTION_FUNCTIONS for loss in phase.loss_functions) for phase in phases]
    for index, (before, now) in enumerate(zip(aligns, aligns[1:], strict=False), start=1):
        if now and not before:
            yield UserError(
                f"phases[{index}].loss_functions",
                "aligns attention after a phase that trained end to end, whose layers need no longer be given the "
                "teacher's inputs; put alignment first",
            )


def _about_lengths(
    phases: list[RunConfig], teacher: PreTrainedConfig | None, student: PreTrainedConfig
) -> Iterator[UserError]:
    nope = FULL in getattr(student, "mixers", []) and not getattr(student, "use_rope", True)
    longest = max(phase.sequence_length for phase in phases)
    reach = 0 if teacher is None else teacher.max_position_embeddings
    if nope and longest < reach:
        yield UserError(
            "sequence_length",
            f"is at most {longest:,}; with NoPE layers retrieval fails past the length trained on, "
            f"and the published advice is to train on twice the length that will be used (teacher: {reach:,})",
        )


def about_phase(
    config: RunConfig,
    settings: Settings,
    timing: Schedule,
    student: PreTrainedModel,
    teacher: PreTrainedConfig | None,
    gpu: GPU,
    gpus: int,
) -> list[UserError]:
    """Warnings about a phase, or about a run without phases; the student frozen as it trains.

    gpus: those that read rows of their own.
    """
    return [
        *_about_held_out_text(config),
        *_about_batches(settings, timing, gpus),
        *_about_budget(config, settings, timing),
        *_about_precision(config, settings, gpu),
        *_about_rows(config, settings, student, teacher, gpu),
    ]


def _about_batches(settings: Settings, timing: Schedule, gpus: int) -> Iterator[UserError]:
    if gpus == 1:
        return
    key, count = "training_args.gradient_accumulation_steps", settings.accumulation
    if count > 1 and count % gpus:
        yield UserError(
            key,
            f"{count} micro-batches cannot be divided over {gpus} GPUs; use a multiple of {gpus} and divide "
            f"it by {gpus} to keep the step of one GPU",
        )
    elif count > 1:
        yield UserError(
            key,
            f"is per GPU, so a step is {timing.tokens_per_step:,} tokens, {gpus} times that of one GPU; "
            f"use {count // gpus} to keep that one",
        )
    else:
        rows = settings.batch_size
        keep = f"use {rows // gpus} to keep that one" if rows % gpus == 0 else "choose the learning rate for it"
        yield UserError(
            "training_args.per_device_train_batch_size",
            f"is per GPU, so a step is {timing.tokens_per_step:,} tokens, {gpus} times that of one GPU; {keep}",
        )


def _about_budget(config: RunConfig, settings: Settings, timing: Schedule) -> Iterator[UserError]:
    budget = "tokens" if config.tokens is not None else "training_args.max_steps"
    if timing.passes is not None and timing.passes > 1.5 and (config.tokens or settings.max_steps > 0):
        yield UserError(
            budget,
            f"reads the data about {timing.passes:.1f} times ({token_text(timing.tokens or 0)} of about "
            f"{token_text(timing.available.tokens if timing.available else 0)} tokens); add text, or lower it",
        )
    steps = timing.steps
    if steps is not None and settings.warmup >= 1 and steps <= settings.warmup:
        yield UserError(
            "training_args.warmup_steps",
            f"{settings.warmup:.0f} steps of warmup are all of {steps} steps; lower it, or raise {budget}",
        )
    if config.tokens is not None and config.tokens < timing.tokens_per_step:
        yield UserError(
            "tokens", f"{config.tokens:,} are less than one step of {timing.tokens_per_step:,} tokens; raise it"
        )


def _about_precision(config: RunConfig, settings: Settings, gpu: GPU) -> Iterator[UserError]:
    in_bf16 = config.trained_weights == "bfloat16"
    if in_bf16 and settings.learning_rate < SMALLEST_BF16_RATE:
        yield UserError(
            "training_args.learning_rate",
            f"{settings.learning_rate:g} is small for trained_weights: bfloat16, where a "
            f"step is mostly rounding; use {SMALLEST_BF16_RATE:g} or more, or trained_weights: float32",
        )
    if in_bf16 and settings.accumulation >= LOSSY_ADDENDS:
        yield UserError(
            "training_args.gradient_accumulation_steps",
            f"the gradients of {settings.accumulation} micro-batches are "
            "added up in bfloat16, which loses more than 1 % of them; use larger micro-batches, or float32",
        )
    if gpu.cuda and settings.compute_dtype == torch.float32:
        yield UserError("training_args.bf16", "is off, so that everything is in float32; set bf16: true")


def _about_rows(
    config: RunConfig, settings: Settings, student: PreTrainedModel, teacher: PreTrainedConfig | None, gpu: GPU
) -> Iterator[UserError]:
    length = config.sequence_length
    uses_teacher = any(loss.function != "cross_entropy" for loss in config.loss_functions)
    if teacher is not None and uses_teacher and length > teacher.max_position_embeddings:
        yield UserError(
            "sequence_length",
            f"{length:,} tokens, but the teacher was trained for {teacher.max_position_embeddings:,}, "
            "and its distribution beyond that is unreliable; lower it, or use cross_entropy alone",
        )
    if length >= LONG and not settings.gradient_checkpointing and gpu.cuda:
        yield UserError(
            "training_args.gradient_checkpointing",
            f"is off at {length:,} tokens per row; set it to true for a third "
            "more work and a fraction of the activations",
        )
    rows = head(student)[0].shape[0]
    if gpu.cuda and rows % 64:
        yield UserError(
            "resize_embeddings_to_multiple_of",
            f"the head has {rows:,} rows and is copied to a multiple of 64 for each "
            "batch, because matrix products on CUDA are slow otherwise; set it to 64",
        )
    if not config.dataset.packing and not config.dataset.prepacked:
        yield UserError(
            "dataset.packing", "is off, so that short documents leave rows half empty; the plan counts full rows"
        )


def remedies(
    plan: PhasePlan, config: RunConfig, settings: Settings, gpu: GPU, shard: int, divided: PhasePlan | None
) -> list[UserError]:
    """Of a phase that does not fit: the keys that would help most, with about how much each gives back.

    shard: GPUs that divide the models. divided: the same phase with models that all GPUs divide, if they can.
    """
    assert plan.memory is not None and plan.cost is not None
    if divided is not None and divided.memory is not None and divided.memory <= gpu.memory:
        problem = (
            f"is missing, and whole models do not fit: {plan.memory / GIB:.1f} GiB of {gpu.name}'s "
            f"{gpu.memory / GIB:.1f}; write {DIVIDED}, with which each GPU has {divided.memory / GIB:.1f} GiB"
        )
        return [UserError("parallel", problem)]
    memory = plan.cost.memory
    activations = memory.get("activations", 0)
    options: list[tuple[float, str]] = []
    if not settings.gradient_checkpointing:
        options.append((0.8 * plan.cost.kept, "training_args.gradient_checkpointing: true"))
    if settings.batch_size > 1:
        half = settings.batch_size // 2
        text = f"training_args.per_device_train_batch_size: {half} and twice the gradient_accumulation_steps"
        options.append((activations * (1 - half / settings.batch_size), text))
    if config.parallel is not None and shard % (2 * config.parallel.context) == 0:
        text = f"parallel.context: {2 * config.parallel.context} and twice the gradient_accumulation_steps"
        options.append((activations / 2, text))
    gradients, states = memory.get("gradients", 0), memory.get("optimizer states", 0)
    quantised = "8bit" in settings.optim or "4bit" in settings.optim
    # Bytes that a trained weight takes beyond those of a frozen one, its gradient and states apart.
    masters = 2.0 if config.trained_weights == "float32" and settings.compute_dtype == torch.bfloat16 else 0.0
    here = plan.trained / shard
    if masters:
        halved = gradients + (0 if quantised else states)
        options.append((masters * here + halved / 2, "trained_weights: bfloat16"))
    if not quantised and states > 2.03 * here:
        options.append((states - 2.03 * here, "training_args.optim: adamw_torch_8bit"))
    if memory.get("teacher weights"):
        options.append((memory["teacher weights"], "a captured teacher (distillkit capture, teacher.kind: dataset)"))
    if of_mlp := plan.groups.get("MLP", (0, 0))[1]:
        each = masters / shard + (gradients + states) / plan.trained
        options.append((each * of_mlp, r"frozen_res: ['\.mlp\.']"))
    if len(config.loss_functions) > 1 and config.layer_mapping == "all" and plan.cost.hidden_states > GIB:
        options.append((plan.cost.hidden_states, "layer_mapping: fewer pairs than all"))
    missing = (plan.memory - gpu.memory) / GIB
    best = sorted(options, reverse=True)[:4]
    listed = "; ".join(f"{text} (about {size / GIB:.0f} GiB)" for size, text in best)
    problem = (
        f"{plan.memory / GIB:.1f} GiB do not fit into {gpu.name}'s {gpu.memory / GIB:.1f} GiB, {missing:.1f} too many; "
        f"what would help: {listed or 'a shorter one'}; or "
        + ("more GPUs" if shard > 1 else f"{DIVIDED} on several GPUs")
    )
    return [UserError("sequence_length", problem)]
