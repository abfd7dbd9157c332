"""A teacher becomes an untrained student: the same network, with another mixer in place of some attention.

The student is laid out without memory and given the teacher's own tensors. Those of a teacher in files are read, and
those of its student written, for one decoder layer at a time; of a loaded teacher the student shares them.
"""

import copy
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from distillkit.config import StudentConfig, UserError
from distillkit.console import print_line
from distillkit.conversion.files import MAX_SHARD_SIZE, ModelFiles
from distillkit.conversion.layouts import layer_mixers
from distillkit.conversion.summary import ConversionSummary, summarize
from distillkit.formatting import byte_text
from distillkit.models.decoder import check_head
from distillkit.models.loading import load_model, load_tokenizer, where
from distillkit.models.recorder import Call, recorded
from distillkit.models.streaming import StoredModel, open_streamed
from distillkit.progress import ProgressReporter
from distillkit.runs.writing import flush, full_disk_errors
from distillkit.student.mixers.calibration import calibration_tokens, mean_attention_distance, repeated_tokens
from distillkit.student.mixers.mixer import Mixer, Start
from distillkit.student.mixers.registry import MIXERS, check_linear_mixer, mixers_of
from distillkit.student.network import KDAHybridConfig, KDAHybridForCausalLM

SECONDS_BETWEEN_LINES = 10

ATTENTION_DISTANCE_TOKENS = 2048
"""In which the distances over which the teacher attends are measured."""


InMemory = Callable[[nn.Module], AbstractContextManager[None]]
"""Within it, the tensors of a module are in memory."""


def _all_is_in_memory(_: nn.Module) -> AbstractContextManager[None]:
    return nullcontext()


def convert(
    teacher_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    student: StudentConfig,
    *,
    trust_remote_code: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    console: Console | None = None,
    **teacher_kwargs: Any,
) -> ConversionSummary:
    """Write the untrained student of a teacher into a new folder, which appears whole or not at all.

    The folder holds safetensors weights, configuration, generation configuration, tokenizer and the model's code. One
    decoder layer is in memory at a time; the whole teacher for those that `open_streamed` names, which is printed.

    teacher_path: a folder, a hub id or a `.gguf` file. teacher_kwargs: of `from_pretrained` (`gguf_file`, `revision`,
        `dtype`, `device_map` …).
    max_shard_size: of one file of weights, in bytes or as text.
    console: shows progress; by default that of stdout.

    Raises `UserError` where the folder exists and is not empty, where the teacher cannot be loaded or converted, and
    where the disk has no room.
    """
    output = Path(output_path).expanduser().absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            "output_path", f"{os.fspath(output_path)!r} exists already; name a new folder, or remove it first"
        )
    check_linear_mixer(student.mixer)
    console = console or Console()
    progress = _Progress(console)
    places = where(teacher_kwargs)
    options: dict[str, Any] = {"key": "teacher", "trust_remote_code": trust_remote_code}
    stored = open_streamed(teacher_path, on_layer=progress.advance, **options, **teacher_kwargs)
    if isinstance(stored, str):
        print_line(console, f"the teacher is loaded whole into memory, because {stored}")
        teacher = load_model(teacher_path, **options, **teacher_kwargs)
        return convert_model(teacher, load_tokenizer(teacher_path, **options, **places), output, student)
    return _convert_stored(
        stored, load_tokenizer(teacher_path, **options, **places), output, student, max_shard_size, progress
    )


def convert_model(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path, student: StudentConfig
) -> ConversionSummary:
    """Write the untrained student of a loaded teacher into a new folder, which appears whole or not at all.

    Raises `UserError` for a teacher that cannot be converted.
    """
    model = build_student(teacher, student)
    with _whole_or_not_at_all(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return summarize(teacher, model)


def build_student(teacher: PreTrainedModel, student: StudentConfig) -> KDAHybridForCausalLM:
    """The untrained student of a loaded teacher, in evaluation mode.

    What is not exchanged is the teacher's own tensors, shared with it: training one of the two changes the other.

    Raises `UserError` for a teacher that cannot be converted.
    """
    check_teacher(teacher, student)
    check_head(teacher, "teacher")
    model = _laid_out(teacher, student)
    for index in exchanged_layers(model):
        weight = next(teacher.get_decoder().layers[index].self_attn.parameters())
        model.model.layers[index].self_attn.to_empty(device=weight.device)
    _convert_layers(teacher, model, student)
    return model


def _convert_stored(
    stored: StoredModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    student: StudentConfig,
    max_shard_size: int | str,
    progress: "_Progress",
) -> ConversionSummary:
    """`convert_model` for a teacher in files, one decoder layer in memory at a time."""
    teacher = stored.model
    check_teacher(teacher, student)
    model = _laid_out(teacher, student)
    tensors = remove_tied_weights_from_state_dict(model.state_dict(), model)
    exchanged = exchanged_layers(model)
    initialization = student.initialization
    passes = 3 + any(mixer.needs_attention_distances(initialization) for mixer in exchanged.values())
    passes += initialization.output_scale == "fitted"
    layers = len(model.model.layers)
    with (
        full_disk_errors(lambda: f"while the student was written to {str(output)!r}"),
        _whole_or_not_at_all(output) as folder,
        progress.of(passes * layers),
    ):
        _check_room(folder, tensors)
        with stored.in_memory(teacher.get_output_embeddings()):
            check_head(teacher, "teacher")
        model.save_pretrained(folder, state_dict={})
        tokenizer.save_pretrained(folder)
        files = ModelFiles(folder, tensors, model.num_parameters(), max_shard_size)
        converted = StoredModel(model, files.of, write=files.write)
        _convert_layers(teacher, model, student, stored.in_memory, converted.in_memory)
        kept = [name for name in tensors if not name.startswith(_attention_names(exchanged))]
        for name in kept:
            files.write(name, stored.read(name))
            progress.advance(layers / len(kept))
    return summarize(teacher, model)


def _laid_out(teacher: PreTrainedModel, student: StudentConfig) -> KDAHybridForCausalLM:
    """The student with the teacher's tensors, and with layers on the meta device where others come."""
    model = student_on_meta(teacher.config, student)
    exchanged = exchanged_layers(model)
    _share_tensors(teacher, model, exchanged)
    for index in exchanged:
        weight = next(teacher.get_decoder().layers[index].self_attn.parameters())
        model.model.layers[index].self_attn.to(weight.dtype)
    model.tie_weights()
    model.eval()
    model.generation_config = copy.deepcopy(teacher.generation_config)
    return model


def _convert_layers(
    teacher: PreTrainedModel,
    model: KDAHybridForCausalLM,
    student: StudentConfig,
    teachers: InMemory = _all_is_in_memory,
    students: InMemory = _all_is_in_memory,
) -> None:
    """Set every parameter of the exchanged layers."""
    exchanged = exchanged_layers(model)
    generator = torch.Generator().manual_seed(student.seed)
    distances = attention_distances(teacher, exchanged, student)
    for index, mixer in exchanged.items():
        attention, layer = teacher.get_decoder().layers[index].self_attn, model.model.layers[index].self_attn
        start = Start(student.initialization, teacher.config.initializer_range, generator, distances.get(index))
        with teachers(attention), students(layer):
            mixer.initialize(layer, attention, start)
    if student.initialization.output_scale == "fitted":
        calibrate_layers(teacher, model, generator, students)


def exchanged_layers(model: KDAHybridForCausalLM) -> dict[int, Mixer]:
    """The mixers of the layers whose attention is not the teacher's own, by layer."""
    return {index: mixer for index, mixer in enumerate(mixers_of(model.config)) if not mixer.keeps_teacher_weights}


def calibrate_layers(
    teacher: PreTrainedModel,
    model: KDAHybridForCausalLM,
    generator: torch.Generator | None = None,
    students: InMemory = _all_is_in_memory,
) -> None:
    """Fit every exchanged layer to the teacher's attention, each on what the teacher's layer is given, as it runs."""
    exchanged = exchanged_layers(model)
    attention = _attention(teacher, exchanged)
    projections = {index: module.get_submodule("o_proj") for index, module in attention.items()}
    input_ids = calibration_tokens(model.config.vocab_size, generator)

    def fit(index: int, call: Call) -> None:
        layer = model.model.layers[index].self_attn
        with torch.enable_grad(), students(layer):
            exchanged[index].calibrate(layer, call.input, attention_outputs.pop(index))

    with recorded(projections, _input) as attention_outputs, ExitStack() as records:
        for index, module in attention.items():
            records.enter_context(recorded({index: module}, partial(fit, index)))
        _run_decoder(teacher, input_ids)


def attention_distances(
    teacher: PreTrainedModel, exchanged: Mapping[int, Mixer], student: StudentConfig
) -> dict[int, Tensor]:
    """Tokens that each head looks back on average, `[heads]` on the CPU, for the layers whose mixers start from it.

    Raises `UserError` for a teacher that does not return its attention weights.
    """
    layers = [index for index, mixer in exchanged.items() if mixer.needs_attention_distances(student.initialization)]
    if not layers:
        return {}

    def distance(call: Call) -> Tensor:
        weights = call.returned[1]
        if weights is None:
            raise UserError(
                "student.initialization.memory",
                f"attended needs attention weights, which {type(teacher).__name__} does not return; use spread",
            )
        return mean_attention_distance(weights).cpu()

    positions = getattr(teacher.config, "max_position_embeddings", ATTENTION_DISTANCE_TOKENS)
    length = min(ATTENTION_DISTANCE_TOKENS, positions)
    # A generator of its own: the random parameters are the same whether distances are measured or not.
    input_ids = repeated_tokens(teacher.config.vocab_size, length, torch.Generator().manual_seed(student.seed))
    implementation = teacher.config._attn_implementation
    teacher.set_attn_implementation("eager")  # no other returns its weights
    try:
        with recorded(_attention(teacher, layers), distance) as found:
            _run_decoder(teacher, input_ids)
    finally:
        teacher.set_attn_implementation(implementation)
    return found


def student_on_meta(teacher_config: PreTrainedConfig, student: StudentConfig) -> KDAHybridForCausalLM:
    """The student without memory for its weights, to be filled or counted."""
    base_config = copy.deepcopy(teacher_config)
    base_config.__dict__.pop("quantization_config", None)
    base_config._name_or_path = ""  # a folder of this machine is nobody else's business
    config = KDAHybridConfig(
        base_config=base_config,
        mixers=layer_mixers(teacher_config.num_hidden_layers, student),
        kv_heads=student.kv_heads,
        use_rope=student.keep_rope,
        attn_implementation=teacher_config._attn_implementation,
        dtype=teacher_config.dtype,
    )
    with torch.device("meta"):
        return KDAHybridForCausalLM(config).to(teacher_config.dtype or torch.float32)


def check_teacher(teacher: PreTrainedModel, student: StudentConfig) -> None:
    """Raise `UserError`, naming what is missing, for a model whose attention cannot be exchanged."""
    check_linear_mixer(student.mixer)
    name = type(teacher).__name__
    if type(teacher.config) not in MODEL_MAPPING or isinstance(teacher.config, KDAHybridConfig):
        raise UserError("teacher", f"{name} is no decoder of transformers' own and cannot be converted")
    layers = dict(teacher.get_decoder().named_children()).get("layers")
    if not isinstance(layers, nn.ModuleList):
        raise UserError("teacher", f"{name} cannot be converted: its decoder has no `layers`")
    for index, (layer, mixer) in enumerate(zip(layers, layer_mixers(len(layers), student), strict=True)):
        place = f"{name} cannot be converted: layer {index}"
        attention = dict(layer.named_children()).get("self_attn")
        if attention is None:
            raise UserError("teacher", f"{place} has no self_attn")
        if (problem := MIXERS[mixer].check(attention)) is not None:
            raise UserError("teacher", f"{place}.self_attn {problem}")


def _share_tensors(teacher: PreTrainedModel, model: KDAHybridForCausalLM, layers: Iterable[int]) -> None:
    """Give the student every tensor of the teacher but those of the attention of `layers`.

    Raises `UserError` where the two do not have the same names, apart from that attention.
    """
    exchanged = _attention_names(layers)
    kept = {name: tensor for name, tensor in teacher.state_dict().items() if not name.startswith(exchanged)}
    report = model.load_state_dict(kept, strict=False, assign=True)
    missing = [name for name in report.missing_keys if not name.startswith(exchanged)]
    if missing or report.unexpected_keys:
        difference = (missing + report.unexpected_keys)[0]
        raise UserError("teacher", f"{type(teacher).__name__} cannot be converted: no counterpart for {difference}")
    for name, buffer in teacher.named_buffers(remove_duplicate=False):  # also rotary frequencies, not in the state_dict
        if not name.startswith(exchanged):
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, buffer)


def _attention_names(layers: Iterable[int]) -> tuple[str, ...]:
    """What the names of the tensors of these layers' attention begin with."""
    return tuple(f"model.layers.{index}.self_attn." for index in layers)


def _attention(model: PreTrainedModel, layers: Iterable[int]) -> dict[int, nn.Module]:
    return {index: model.get_decoder().layers[index].self_attn for index in layers}


@torch.no_grad()
def _run_decoder(teacher: PreTrainedModel, input_ids: Tensor) -> None:
    """For what is recorded meanwhile. A teacher in files runs on the CPU."""
    weight = teacher.get_input_embeddings().weight
    teacher.get_decoder()(input_ids=input_ids.to("cpu" if weight.is_meta else weight.device), use_cache=False)


def _input(call: Call) -> Tensor:
    return call.input


def _check_room(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises `UserError` where the disk has no room for the weights."""
    needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            "output_path",
            f"has no room: {byte_text(free)} are free at {str(folder.parent)!r}, but the student needs "
            f"{byte_text(needed)}; free some, or choose another output_path",
        )


class _Progress:
    """Of a conversion: layers that were run or written."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._reporter: ProgressReporter | None = None
        self._done = self._total = 0.0

    @contextmanager
    def of(self, total: int) -> Iterator[None]:
        self._total = total
        with ProgressReporter(self._console, total, SECONDS_BETWEEN_LINES) as self._reporter:
            yield

    def advance(self, layers: float = 1) -> None:
        if self._reporter is None:
            return
        self._done += layers
        text = f"{self._done / self._total:.0%}, {self._reporter.time_left(self._done)}"
        self._reporter.update(self._done, "converting", text, f"converting: {text}")


@contextmanager
def _whole_or_not_at_all(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place once everything is in it."""
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):  # a file of weights is full of zeros until they reach the disk
            flush(path)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
