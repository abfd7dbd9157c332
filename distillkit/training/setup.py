"""The two models of a run and their tokenizer, loaded and made ready: the student converted first if need be."""

import itertools
import shutil
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_flash_attn_2_available

from distillkit.config import DatasetTeacherConfig, HFTeacherConfig, RunConfig, UserError
from distillkit.config.losses import align_attention_alone
from distillkit.config.resolve import ORIGIN_KWARGS
from distillkit.console import print_line
from distillkit.conversion.convert import convert, convert_model
from distillkit.models.attention import trained_attention
from distillkit.models.decoder import check_head, head
from distillkit.models.divided_rows import Context
from distillkit.models.float8 import check_float8, exchange, float8_layers
from distillkit.models.loading import load_model, load_tokenizer, where
from distillkit.models.placement import offload_layers, own_devices, refuse_spilled
from distillkit.models.quantization import quantization_arguments
from distillkit.models.streaming import StoredModel, open_stored
from distillkit.models.varlen_attention import use_varlen_attention
from distillkit.models.vocabulary import common_vocabulary, load_students_tokenizer
from distillkit.runs.clock import CONVERSION, Clock
from distillkit.runs.fingerprints import differences, files_in, fingerprint
from distillkit.runs.folder import PhaseFolder
from distillkit.runs.record import read_record
from distillkit.runs.secrets import without_secrets
from distillkit.student.mixers.registry import check_linear_mixer
from distillkit.teacher import Teacher
from distillkit.teacher.aligned import AlignedTeacher
from distillkit.teacher.opening import captured_tokenizer, open_teacher
from distillkit.training.arguments import Arguments
from distillkit.training.context import context_of, divide_rows_of
from distillkit.training.distiller import Distiller
from distillkit.training.embeddings import grow_embeddings
from distillkit.training.freezing import Freezing, examples, freeze, freeze_all_but
from distillkit.training.lora import add_adapter, load_adapter
from distillkit.training.parallel import Mesh, divide, main_process_first, mesh_of, place_student, place_teacher, within
from distillkit.training.precision import bfloat16_is_slow, cast_for_training, compute_dtype
from distillkit.training.wiring import objective_of


@dataclass(frozen=True)
class Models:
    """Teacher and student on the device of the run; the student frozen and cast as it trains."""

    teacher: Teacher
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocabulary_size: int
    """Tokens that both models know."""
    mesh: Mesh
    """Over which the student is still to be divided."""
    stored: StoredModel | None
    """The files of a student that is on the meta device until then."""
    context: Context | None
    """The processes that share rows."""
    embedding_rows: int
    """Rows of the student's embeddings before these grew."""
    freezing: Freezing
    adapter: Any
    """peft's model around the student, where `lora` trains one; else None."""


def load_models(
    config: RunConfig,
    folder: PhaseFolder,
    arguments: Arguments,
    console: Console,
    clock: Clock,
) -> Models:
    """Load what a run needs. The student of a resumed run comes from its checkpoint, float32 masters and all."""
    trainer, techniques = arguments.trainer, arguments.techniques
    for key, remedy in config.in_float8.items():
        check_float8(trainer.device, key, remedy)
    mesh = mesh_of(config.parallel, trainer.world_size, trainer.device)
    context = context_of(config.parallel, trainer)
    model = _load_teacher(config, folder, trainer, console, mesh, clock)
    tokenizer, teachers_tokenizer = _load_tokenizers(config)
    teacher = open_teacher(config, model, tokenizer, teachers_tokenizer)
    origin = str(folder.untrained) if config.model is None else config.model
    resumed = None if folder.checkpoint is None else folder.checkpoint.path
    path = origin if resumed is None or config.lora is not None else resumed
    student, stored = _load_student(config, path, trainer, console, mesh)
    embedding_rows = _grow_embeddings(config, folder, student, console)
    adapter = None
    if config.lora is None:
        freezing = freeze(student, config.frozen_res, config.frozen_modules)
    else:
        adapter, freezing = add_adapter(student, config.lora, origin)
        if resumed is not None:
            load_adapter(adapter, resumed)
    for matched, other in freezing.shared_with_frozen:
        print_line(console, f"frozen: {other} too, for it is the same tensor as {matched}")
    dtype = compute_dtype(trainer)
    trained_dtype = torch.bfloat16 if config.trained_weights == "bfloat16" else torch.float32
    print_line(console, cast_for_training(student, dtype, trained_dtype))
    if dtype == torch.bfloat16 and bfloat16_is_slow(trainer.device):
        print_line(
            console,
            "training_args.bf16: this CPU has no AVX-512, so bfloat16 is several times slower than float32 here; set "
            "training_args.bf16=false and teacher.kwargs.dtype=float32",
        )
    if align_attention_alone(config.loss_functions):
        freezing = _freeze_all_but_attention(student, freezing, console)
    if config.frozen_precision is not None:
        float8_layers(student, "frozen_precision")  # which it refuses to be without
    student = place_student(student, trainer.device, mesh)
    if context is not None:
        divide_rows_of(student, "model")
    elif config.use_flash_attention and config.model_kwargs.get("attn_implementation") != "sdpa":
        use_varlen_attention(student, dtype)
    if techniques.gradient_checkpointing:
        checkpoint_layers(student, dict(techniques.gradient_checkpointing_kwargs))
    read_by = (tokenizer,) if isinstance(teacher, AlignedTeacher) else (tokenizer, teachers_tokenizer)
    vocabulary_size = common_vocabulary(teacher.vocabulary_size, student, *read_by)
    return Models(
        teacher, student, tokenizer, vocabulary_size, mesh, stored, context, embedding_rows, freezing, adapter
    )


def build_distiller(config: RunConfig, models: Models, arguments: TrainingArguments) -> Distiller:
    """The student with its objective, divided where `parallel` wants it. Raises `UserError` for a head that is none."""
    objective = objective_of(config, models.student, models.teacher, models.vocabulary_size)
    distiller = divide(Distiller(models.student, objective), arguments.device, models.mesh, models.stored)
    dtype = compute_dtype(arguments)
    with torch.autocast(arguments.device.type, dtype=dtype, enabled=dtype != torch.float32):
        within(distiller, lambda: check_head(models.student, "model"))
    return distiller


def _grow_embeddings(config: RunConfig, folder: PhaseFolder, student: PreTrainedModel, console: Console) -> int:
    """Grow the embeddings where the configuration wants it; the rows before, which a checkpoint does not contain."""
    rows, grown = grow_embeddings(student, config.resize_embeddings_to_multiple_of or 1)
    if grown > rows:
        print_line(console, f"embeddings: {rows:,} rows grow to {grown:,}; those added mean no token")
    if folder.checkpoint is not None:
        return folder.record.embedding_rows or rows
    if config.model is not None:  # they may have grown in the phase before
        former = read_record(Path(config.model))
        rows = min(rows, rows if former is None else former.embedding_rows or rows)
    folder.update_record(embedding_rows=rows)
    return rows


def _freeze_all_but_attention(student: PreTrainedModel, freezing: Freezing, console: Console) -> Freezing:
    """Losses of attention outputs reach nothing else: it needs no optimizer state, and no gradient is communicated."""
    names = freeze_all_but(student, itertools.chain(*trained_attention(student).values()))
    if not names:
        return freezing
    idle = sum(student.get_parameter(name).numel() for name in names)
    print_line(
        console, f"no loss reaches {idle:,} parameters that are not frozen ({examples(names)}); they stay as they are"
    )
    return replace(freezing, trainable=freezing.trainable - idle, frozen=freezing.frozen + idle)


def checkpoint_layers(student: PreTrainedModel, options: dict[str, Any]) -> None:
    """Gradient checkpointing, with the options that Trainer takes for it.

    A checkpointed layer is run again just before its backward pass: what a mixer's kernels keep in between is
    short-lived, and to keep all of it (`keep_intermediates`) is quicker than to make part of it a third time.
    """
    layers = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5.17 does not know the new name of this method
        student.gradient_checkpointing_enable(options, **layers)
    for layer in student.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            for module in layer.modules():
                if hasattr(module, "keep_intermediates"):
                    module.keep_intermediates = layer.gradient_checkpointing


def _load_student(
    config: RunConfig, path: str | Path, arguments: TrainingArguments, console: Console, mesh: Mesh
) -> tuple[PreTrainedModel, StoredModel | None]:
    """In float32, from which everything else is cast; on the meta device where it is read once it is divided."""
    # A checkpoint of the student lies elsewhere than the student itself.
    unused = ("torch_dtype", "dtype", *(() if str(path) == config.model else ORIGIN_KWARGS))
    kwargs: dict[str, Any] = {name: value for name, value in config.model_kwargs.items() if name not in unused}
    if _wants_flash_attention(config, arguments) and not config.divides_rows:
        kwargs.setdefault("attn_implementation", "flash_attention_2")
    options: dict[str, Any] = {
        "key": "model" if str(path) == config.model else "output_path",
        "auto_class": config.model_auto_class or "AutoModelForCausalLM",
        "trust_remote_code": config.trust_remote_code,
        "dtype": torch.float32,
        **kwargs,
    }
    student, stored = _open(path, console, mesh, **options)
    if stored is not None and head(student)[0].shape[0] % (config.resize_embeddings_to_multiple_of or 1):
        _say_whole(console, options["key"], "its embeddings grow")
        return load_model(path, **options), None
    return student, stored


def _open(path: str | Path, console: Console, mesh: Mesh, **options: Any) -> tuple[PreTrainedModel, StoredModel | None]:
    """A model in memory; or, where it will be divided, on the meta device with its files, unless that cannot be."""
    if mesh is None:
        return load_model(path, **options), None
    stored = open_stored(path, **options)
    if isinstance(stored, str):
        _say_whole(console, options["key"], stored)
        return load_model(path, **options), None
    return stored.model, stored


def _say_whole(console: Console, key: str, reason: str) -> None:
    print_line(console, f"{key}: each process loads the whole model before it is divided, because {reason}")


def _wants_flash_attention(config: RunConfig, arguments: TrainingArguments) -> bool:
    """It computes in 16 bits only. By default its absence is not warned of."""
    explicit = "use_flash_attention" in config.model_fields_set
    in_16_bits = compute_dtype(arguments) != torch.float32
    return config.use_flash_attention and in_16_bits and (explicit or is_flash_attn_2_available())


def _load_teacher(
    config: RunConfig,
    folder: PhaseFolder,
    arguments: TrainingArguments,
    console: Console,
    mesh: Mesh,
    clock: Clock,
) -> PreTrainedModel | None:
    """The model of a live teacher, read once: the student is converted from it, unless that was done already."""
    teacher = config.teacher
    if not isinstance(teacher, HFTeacherConfig):
        return None
    if config.student is not None:
        check_linear_mixer(config.student.mixer)
    options = {"trust_remote_code": config.trust_remote_code, **teacher.kwargs}
    float8 = teacher.quantization == "float8"
    if teacher.quantization is not None and not float8:
        quantized = quantization_arguments(teacher.quantization, compute_dtype(arguments), arguments.device)
        options = {**quantized, **options}
    if teacher.devices is not None:
        options = {**options, **own_devices(teacher.devices)}
    placed = teacher.offload is None and teacher.quantization is None and "device_map" not in options
    model, stored = _open(teacher.path, console, mesh if placed else None, key="teacher.path", **options)
    if teacher.devices is not None:
        refuse_spilled(model)
    if config.student is not None:
        whole = model if stored is None else None
        with clock.span(CONVERSION):
            main_process_first(arguments, lambda: _convert(config, teacher, whole, folder, console))
    if float8:
        own = teacher.devices is not None or "device_map" in options
        exchange(model.requires_grad_(False), "teacher.quantization", device=None if own else arguments.device)
        model = model if own else place_teacher(model, arguments.device, None)
    if teacher.quantization is not None:
        print_line(console, f"teacher: linear layers are {teacher.quantization}, embeddings and head {model.dtype}")
    if teacher.offload is not None:
        model = offload_layers(model, arguments.device)
    elif placed:
        model = place_teacher(model, arguments.device, mesh, stored)
    if config.divides_rows:
        divide_rows_of(model, "teacher.path")
    elif config.use_flash_attention and teacher.kwargs.get("attn_implementation") != "sdpa":
        use_varlen_attention(model, model.dtype)
    check_head(model, "teacher.path")
    return model


def _convert(
    config: RunConfig, teacher: HFTeacherConfig, model: PreTrainedModel | None, folder: PhaseFolder, console: Console
) -> None:
    """Convert the teacher into `untrained`, which one process does, unless the same is there or trained already.

    model: the teacher; None for one that is not in memory, which is converted from its files, layer by layer.
    """
    assert config.student is not None
    if not folder.main_process or folder.checkpoint is not None:
        if folder.main_process and config.lora is not None:
            _check_under_adapter(folder)
        return
    sections = {"student": config.student.model_dump(mode="json"), "teacher": teacher.model_dump(mode="json")}
    weights = (folder.record.origins or {}).get("teacher", {}).get("weights_sha256")
    recipe, former = {**without_secrets(sections), "weights_sha256": weights}, folder.record.converted or {}
    same = folder.untrained.exists() and {**recipe, "files": former.get("files")} == former
    if same and not differences(files_in(folder.untrained), former["files"]):
        return
    for remains in (folder.untrained, *folder.path.glob(f".{folder.untrained.name}.*")):
        shutil.rmtree(remains, ignore_errors=True)
    if model is None:
        options = {"trust_remote_code": config.trust_remote_code, "console": console, **teacher.kwargs}
        summary = convert(teacher.path, folder.untrained, config.student, **options)
    else:
        summary = convert_model(model, _load_teachers_tokenizer(config, teacher), folder.untrained, config.student)
    console.print(summary)
    folder.update_record(converted={**recipe, "files": fingerprint(files_in(folder.untrained), limit=None)})


def _check_under_adapter(folder: PhaseFolder) -> None:
    """Raises `UserError` where the converted student is another than the checkpoint's adapter was trained on."""
    files = files_in(folder.untrained) if folder.untrained.is_dir() else {}
    if found := differences(files, (folder.record.converted or {}).get("files", {})):
        problem = f"the checkpoint's adapter belongs to the student in {folder.untrained}, of which {found[0]}"
        raise UserError("lora", f"{problem}; bring it back, or start again in another output_path")


def _load_tokenizers(config: RunConfig) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """The student's tokenizer, which reads the text (the teacher's where the student comes without); the teacher's."""
    options = {"trust_remote_code": config.trust_remote_code, **where(config.model_kwargs)}
    if not isinstance(config.teacher, HFTeacherConfig):
        student = load_tokenizer(str(config.model), key="model", **options)
        captured = isinstance(config.teacher, DatasetTeacherConfig)
        return student, captured_tokenizer(config.dataset.train_dataset, student) if captured else student
    teacher = _load_teachers_tokenizer(config, config.teacher)
    if config.model is None:
        return teacher, teacher
    if config.teacher.tokenizer == "own":
        return load_tokenizer(config.model, key="model", **options), teacher
    return load_students_tokenizer(config.model, teacher, "model", **options), teacher


def _load_teachers_tokenizer(config: RunConfig, teacher: HFTeacherConfig) -> PreTrainedTokenizerBase:
    options = {"trust_remote_code": config.trust_remote_code, **where(teacher.kwargs)}
    return load_tokenizer(teacher.path, key="teacher.path", **options)
