"""`distillkit plan`: what a run would cost, from configurations and headers alone."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from distillkit.compression import build_codec
from distillkit.config import HFTeacherConfig, Phase, Run, RunConfig, UserError
from distillkit.config.losses import align_attention_alone
from distillkit.config.resolve import AnyRun, as_run
from distillkit.planning.advice import about_phase, about_run, remedies
from distillkit.planning.disk import disk_use
from distillkit.planning.gpus import GPU, find_gpu, seconds
from distillkit.planning.meta_models import (
    parameter_groups,
    read_config,
    student_config,
    student_model,
    teacher_on_meta,
)
from distillkit.planning.result import PhasePlan, RunPlan
from distillkit.planning.settings import Settings
from distillkit.planning.step import FakeCapturedTeacher, StepCost, reached_by, rehearse
from distillkit.planning.tokens import schedule
from distillkit.shards import read_manifest
from distillkit.teacher import Teacher
from distillkit.teacher.live import LiveTeacher
from distillkit.training.freezing import freeze_matching
from distillkit.training.precision import cast_for_training


def plan_run(run: AnyRun, *, gpu: str = "H100", gpus: int = 1) -> RunPlan:
    """The plan of a run, with phases or without, on so many GPUs of one kind.

    Raises `UserError` where a model's configuration cannot be read; what else is wrong is among the plan's errors.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what it says of a configuration, the run says
    try:
        return _plan(as_run(run), find_gpu(gpu), gpus)
    finally:
        transformers_logging.set_verbosity(level)


def _plan(run: Run, device: GPU, gpus: int) -> RunPlan:
    first = run.phases[0].config
    teacher = _teacher_config(first)
    student = student_config(first, teacher)
    makers = [_PhaseMaker(phase, student, device, gpus) for phase in run.phases]
    made = [maker.plan() for maker in makers]
    plan = RunPlan(
        gpu=device,
        gpus=gpus,
        teacher=first.teacher.path if isinstance(first.teacher, HFTeacherConfig) else first.teacher.kind,
        teacher_parameters=makers[0].teacher_parameters,
        student_parameters=sum(total for total, _ in made[0].groups.values()),
        phases=made,
        untrained=makers[0].untrained if first.student is not None else 0,
    )
    errors, warnings = about_run(run, plan, teacher, student)
    for maker in makers:
        errors = errors + maker.errors
    warnings += _each_once(makers)
    return replace(plan, errors=errors, warnings=warnings)


def _each_once(makers: "list[_PhaseMaker]") -> list[str]:
    """Each line under the key as the YAML has it: a phase's own, or the top level's, once for all that inherit it."""
    inherited: dict[str, list[str]] = {}
    lines = []
    for maker in makers:
        for warning in maker.warnings:
            if maker.phase.names(warning.key):
                lines.append(str(maker.phase.located(warning)))
            else:
                inherited.setdefault(str(warning), []).append(maker.phase.name)
    for line, names in inherited.items():
        lines.append(line if len(names) == len(makers) else f"{line} (phase {', '.join(names)})")
    return lines


def _teacher_config(config: RunConfig) -> PreTrainedConfig | None:
    teacher = config.teacher
    if not isinstance(teacher, HFTeacherConfig):
        return None
    return read_config(teacher.path, "teacher.path", teacher.kwargs, config.trust_remote_code)


@dataclass
class _PhaseMaker:
    """Makes the plan of one phase, and notes what is doubtful on the way."""

    phase: Phase
    student_config: PreTrainedConfig
    gpu: GPU
    gpus: int

    def __post_init__(self) -> None:
        self.config = self.phase.config
        self.settings = Settings.of(self.config)
        self.errors: list[str] = []
        self.warnings: list[UserError] = []
        self.teacher_parameters: int | None = None
        self.untrained = 0

    def plan(self) -> PhasePlan:
        config, settings = self.config, self.settings
        teacher_config = _teacher_config(config)
        teacher = self._teacher(teacher_config)
        student = student_model(config, self.student_config)
        freeze_matching(student, config.frozen_res, config.frozen_modules)
        reached = reached_by(student, config)
        groups = parameter_groups(student, reached)
        trained_dtype = torch.bfloat16 if config.trained_weights == "bfloat16" else torch.float32
        cast_for_training(student, settings.compute_dtype, trained_dtype)
        if teacher.model is not None:
            self.teacher_parameters = sum(parameter.numel() for parameter in teacher.model.parameters())
            self.untrained = sum(total for total, _ in groups.values()) * teacher.model.dtype.itemsize
        timing = schedule(config, settings, self.gpus)
        disk = disk_use(student, settings, reached, masters=not self.phase.is_last)
        errors, warnings = about_phase(config, settings, timing, student, reached, teacher_config, self.gpu, self.gpus)
        cost = self._rehearse(teacher, student) if reached else None
        made = PhasePlan(
            name=self.phase.name if self.phase.changes is not None else "",
            sequence_length=config.sequence_length,
            losses=[loss.function for loss in config.loss_functions],
            schedule=timing,
            trainable=sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad),
            trained=sum(parameter.numel() for parameter in reached),
            groups=groups,
            cost=cost,
            micro_batch=settings.batch_size * config.sequence_length,
            seconds=None,
            tokens_per_second=None,
            disk=disk,
        )
        made = self._timed(made, student.config)
        warnings += remedies(made, config, settings, self.gpu, self.teacher_parameters)
        self.errors += [str(self.phase.located(error)) for error in errors]
        self.warnings += warnings
        return made

    def _teacher(self, config: PreTrainedConfig | None) -> Teacher:
        if isinstance(self.config.teacher, HFTeacherConfig):
            assert config is not None
            return LiveTeacher(teacher_on_meta(config, self.config.teacher, self.config.trust_remote_code))
        return _captured(self.config, self.student_config.vocab_size)

    def _rehearse(self, teacher: Teacher, student: PreTrainedModel) -> StepCost | None:
        try:
            return rehearse(self.config, self.settings, teacher, student, cuda=self.gpu.cuda, gpus=self.gpus)
        except UserError as error:  # losses that these two models cannot have
            self.errors.append(str(self.phase.located(error)))
            return None

    def _timed(self, made: PhasePlan, student: PreTrainedConfig) -> PhasePlan:
        if made.cost is None:
            return made
        # Alignment calls attention alone: little of it is there to be compiled, and few kernels are started.
        whole_layers = not align_attention_alone(self.config.loss_functions)
        per_batch = seconds(
            sum(made.cost.flops.values()),
            made.cost.attention_flops,
            self.gpu,
            student.hidden_size,
            self.settings.compute_dtype,
            compiled=self.settings.torch_compile and whole_layers,
            trained_layers=student.num_hidden_layers if whole_layers else 0,
        )
        if per_batch is None:
            return made
        speed = made.micro_batch * self.gpus / per_batch
        tokens = made.schedule.tokens
        return replace(made, seconds=None if tokens is None else tokens / speed, tokens_per_second=speed)


def _captured(config: RunConfig, vocabulary: int) -> FakeCapturedTeacher:
    """A captured teacher's stand-in, stored as its manifest or the YAML says."""
    teacher = config.teacher
    folder = config.dataset.train_dataset.disk_path
    manifest = None if folder is None else read_manifest(Path(folder))
    if manifest is not None:
        codec = build_codec(manifest.codec_kind, manifest.codec_config)
        return FakeCapturedTeacher(codec.k, codec.vocabulary_size, codec.bytes_per_token)
    for kind in ("logprob_compressor", "legacy_logit_compression"):
        section = vars(teacher).get(kind)
        if section is not None:
            codec = build_codec(kind, section)
            return FakeCapturedTeacher(codec.k, codec.vocabulary_size, codec.bytes_per_token)
    return FakeCapturedTeacher(64, vars(teacher).get("vocab_size") or vocabulary, 64 * 8)
