"""`distillkit plan`: what a run would cost, from configurations and headers alone."""

from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformers import PreTrainedConfig

from distillkit.compression import build_codec
from distillkit.config import HFTeacherConfig, Phase, RunConfig, ServerTeacherConfig, UserError
from distillkit.config.losses import align_attention_alone
from distillkit.config.resolve import AnyRun, as_run
from distillkit.models.float8 import no_float8
from distillkit.planning.advice import about_phase, about_run, remedies
from distillkit.planning.disk import disk_use
from distillkit.planning.gpus import GPU, find_gpu, seconds
from distillkit.planning.meta_models import (
    check_files,
    parameter_groups,
    read_config,
    student_config,
    student_model,
    teacher_on_meta,
    transformers_silenced,
)
from distillkit.planning.processes import Processes
from distillkit.planning.result import PhasePlan, RunPlan, StepTime
from distillkit.planning.settings import Settings
from distillkit.planning.step import FakeCapturedTeacher, StepCost, reached_by, simulate_step
from distillkit.planning.tokens import schedule
from distillkit.teacher import Teacher
from distillkit.teacher.live import LiveTeacher
from distillkit.teacher.opening import manifest_of, named_formats
from distillkit.training.freezing import freeze, freeze_matching
from distillkit.training.lora import add_adapter
from distillkit.training.precision import cast_for_training


@dataclass(frozen=True)
class _PlannedPhase:
    phase: Phase
    plan: PhasePlan
    errors: list[UserError]
    warnings: list[UserError]
    teacher_parameters: int | None
    teacher_dtype: torch.dtype | None
    """None for a captured one."""


@transformers_silenced()
def plan_run(run: AnyRun, *, gpu: str = "H100", gpus: int | None = None, nodes: int = 1) -> RunPlan:
    """The plan of a run, with phases or without, on nodes of so many GPUs of one kind.

    gpus: of each node; None for one, or as many as `parallel` names. Raises `UserError` where `parallel` names another
    number, and where a model's configuration cannot be read; other errors are listed in the plan.
    """
    run, device = as_run(run), find_gpu(gpu)
    config = run.phases[0].config
    processes = Processes.of(config.parallel, gpus, nodes)
    teacher = _teacher_config(config)
    student = student_config(config, teacher)
    options = config.trust_remote_code
    if isinstance(config.teacher, HFTeacherConfig) and teacher is not None:
        check_files(config.teacher.path, "teacher.path", teacher, config.teacher.kwargs, options)
    if config.model is not None:
        check_files(config.model, "model", student, config.model_kwargs, options)
    planned = [_plan_phase(phase, student, device, processes) for phase in run.phases]
    first = planned[0]
    parameters = sum(total for total, _ in first.plan.groups.values())
    plan = RunPlan(
        gpu=device,
        gpus=processes.count,
        nodes=processes.nodes,
        shard=processes.shard,
        replicate=processes.replicate,
        context=processes.context,
        teacher=config.teacher.path if isinstance(config.teacher, HFTeacherConfig) else config.teacher.kind,
        teacher_parameters=first.teacher_parameters,
        student_parameters=parameters,
        phases=[each.plan for each in planned],
        untrained=parameters * first.teacher_dtype.itemsize if config.student and first.teacher_dtype else 0,
    )
    errors, warnings = about_run(run, plan, teacher, first.teacher_dtype, student)
    errors += [str(each.phase.located(error)) for each in planned for error in each.errors]
    return replace(plan, errors=errors, warnings=warnings + _phase_warnings(planned))


def _phase_warnings(planned: list[_PlannedPhase]) -> list[str]:
    """Each warning under the key as the YAML has it; one about a key of the top level once for all its phases."""
    inherited: dict[str, list[str]] = {}
    lines = []
    for each in planned:
        for warning in each.warnings:
            if each.phase.names(warning.key):
                lines.append(str(each.phase.located(warning)))
            else:
                inherited.setdefault(str(warning), []).append(each.phase.name)
    for line, names in inherited.items():
        lines.append(line if len(names) == len(planned) else f"{line} (phase {', '.join(names)})")
    return lines


def _teacher_config(config: RunConfig) -> PreTrainedConfig | None:
    teacher = config.teacher
    if not isinstance(teacher, HFTeacherConfig):
        return None
    return read_config(teacher.path, "teacher.path", teacher.kwargs, config.trust_remote_code)


def _plan_phase(phase: Phase, student_config: PreTrainedConfig, gpu: GPU, processes: Processes) -> _PlannedPhase:
    config, settings = phase.config, Settings.of(phase.config)
    teacher_config = _teacher_config(config)
    teacher = _teacher(config, teacher_config, student_config.vocab_size)
    student = student_model(config, student_config)
    errors: list[UserError] = []
    try:
        if config.lora is not None:
            add_adapter(student, config.lora, config.model or "")
        else:
            freeze(student, config.frozen_res, config.frozen_modules)
    except UserError as error:
        errors.append(error)
        freeze_matching(student, config.frozen_res, config.frozen_modules)
    if not gpu.float8:
        errors += [no_float8(key, gpu.name, remedy) for key, remedy in config.in_float8.items()]
    reached = reached_by(student, config)
    if not errors and not reached:
        problem = "none of them reaches a parameter that is not frozen; freeze less, or add a loss"
        errors.append(UserError("loss_functions", problem))
    groups = parameter_groups(student, reached)
    trained_dtype = torch.bfloat16 if config.trained_weights == "bfloat16" else torch.float32
    cast_for_training(student, settings.compute_dtype, trained_dtype)
    model = teacher.model
    teacher_parameters = None if model is None else sum(parameter.numel() for parameter in model.parameters())
    timing = schedule(config, settings, processes.readers)
    disk = disk_use(student, settings, reached, masters=not phase.is_last, adapter_alone=config.lora is not None)
    warnings = about_phase(config, settings, timing, student, teacher_config, gpu, processes.readers)
    cost = None
    if reached:
        try:
            cost = simulate_step(config, settings, teacher, student, cuda=gpu.cuda, processes=processes)
        except UserError as error:  # a loss that these two models cannot have
            errors.insert(0, error)
        except (DataDependentOutputException, DynamicOutputShapeException):  # of a loss from a module
            problem = "a loss reads values of its tensors, which a plan does not have; use torch.where instead of if"
            warnings.append(UserError("loss_functions", f"{problem}, to have memory and time estimated"))
    step = None
    if cost is not None and (seconds := _batch_seconds(cost, config, settings, gpu, student.config)) is not None:
        step = StepTime(*(settings.accumulation * each for each in (seconds, *cost.traffic.seconds(gpu))))
    speed = None if step is None else timing.tokens_per_step / step.total
    plan = PhasePlan(
        name=phase.name if phase.changes is not None else "",
        sequence_length=config.sequence_length,
        losses=[loss.name for loss in config.loss_functions],
        schedule=timing,
        trainable=sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad),
        trained=sum(parameter.numel() for parameter in reached),
        groups=groups,
        cost=cost,
        micro_batch=settings.batch_size * processes.tokens(config.sequence_length),
        micro_batches=settings.accumulation,
        step=step,
        seconds=None if speed is None or timing.tokens is None else timing.tokens / speed,
        tokens_per_second=speed,
        disk=disk,
    )
    if plan.memory is not None and plan.memory > gpu.memory:
        divided = None if config.parallel else _divided(phase, student_config, gpu, processes)
        warnings += remedies(plan, config, settings, gpu, processes.shard, divided)
    return _PlannedPhase(phase, plan, errors, warnings, teacher_parameters, None if model is None else model.dtype)


def _divided(phase: Phase, student: PreTrainedConfig, gpu: GPU, processes: Processes) -> PhasePlan | None:
    """The plan of a phase whose models the processes divide among all; None where there is one, or that is refused."""
    if processes.count == 1:
        return None
    try:
        config = RunConfig.parse({**phase.config.model_dump(mode="json"), "parallel": {}})
    except UserError:  # an optimizer that cannot be divided
        return None
    divided = replace(processes, parallel=config.parallel)
    return _plan_phase(replace(phase, config=config), student, gpu, divided).plan


def _batch_seconds(
    cost: StepCost, config: RunConfig, settings: Settings, gpu: GPU, student: PreTrainedConfig
) -> float | None:
    # Alignment calls attention alone: little of it can be compiled, and few kernels are started.
    whole_layers = not align_attention_alone(config.loss_functions)
    return seconds(
        sum(cost.flops.values()),
        cost.attention_flops,
        gpu,
        student.hidden_size,
        settings.compute_dtype,
        compiled=settings.torch_compile and whole_layers,
        trained_layers=student.num_hidden_layers if whole_layers else 0,
        float8=cost.float8_flops,
    )


def _teacher(config: RunConfig, teacher_config: PreTrainedConfig | None, vocabulary: int) -> Teacher:
    """Of a captured or served teacher a stand-in, whose outputs are stored as its manifest or the YAML says."""
    teacher = config.teacher
    if isinstance(teacher, HFTeacherConfig):
        assert teacher_config is not None
        return LiveTeacher(teacher_on_meta(teacher_config, teacher, config.trust_remote_code))
    if isinstance(teacher, ServerTeacherConfig):
        return FakeCapturedTeacher(teacher.top_k, teacher.vocab_size or vocabulary, teacher.top_k * 12)
    manifest = manifest_of(config.dataset.train_dataset)
    if manifest is not None:
        codec = build_codec(manifest.codec_kind, manifest.codec_config)
    elif named := named_formats(teacher):
        codec = build_codec(*next(iter(named.items())))
    else:
        return FakeCapturedTeacher(64, teacher.vocab_size or vocabulary, 64 * 8)
    return FakeCapturedTeacher(codec.k, codec.vocabulary_size, codec.bytes_per_token)
