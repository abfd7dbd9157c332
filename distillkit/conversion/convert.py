"""A teacher becomes an untrained student: the same network, with another mixer in place of some attention.

The student is laid out without memory and given the teacher's own tensors, so a conversion holds the teacher and the
new layers, and nothing twice.
"""

import copy
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from distillkit.config import StudentConfig, UserError
from distillkit.conversion.layouts import layer_mixers
from distillkit.conversion.summary import ConversionSummary, summarize
from distillkit.models.decoder import check_head
from distillkit.models.loading import load_model, load_tokenizer, where
from distillkit.models.recorder import Call, recorded
from distillkit.student.mixers.calibration import calibration_tokens, mean_attention_distance, repeated_tokens
from distillkit.student.mixers.mixer import Mixer, Start
from distillkit.student.mixers.registry import MIXERS, check_linear_mixer, mixers_of
from distillkit.student.network import KDAHybridConfig, KDAHybridForCausalLM

ATTENTION_DISTANCE_TOKENS = 2048
"""In which the distances over which the teacher attends are measured."""


def convert(
    teacher_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    student: StudentConfig,
    *,
    trust_remote_code: bool = False,
    **teacher_kwargs: Any,
) -> ConversionSummary:
    """Write the untrained student of a teacher into a new folder, which appears whole or not at all.

    The folder holds safetensors weights, configuration, generation configuration, tokenizer and the model's code.

    teacher_path: a folder, a hub id or a `.gguf` file. teacher_kwargs: of `from_pretrained` (`gguf_file`, `revision`,
        `dtype`, `device_map` …).

    Raises `UserError` where the folder exists and is not empty, and where the teacher cannot be loaded or converted.
    """
    output = Path(output_path).expanduser().absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            "output_path", f"{os.fspath(output_path)!r} exists already; name a new folder, or remove it first"
        )
    check_linear_mixer(student.mixer)
    teacher = load_model(teacher_path, key="teacher", trust_remote_code=trust_remote_code, **teacher_kwargs)
    places = where(teacher_kwargs)
    tokenizer = load_tokenizer(teacher_path, key="teacher", trust_remote_code=trust_remote_code, **places)
    return convert_model(teacher, tokenizer, output, student)


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
    model = student_on_meta(teacher.config, student)
    exchanged = exchanged_layers(model)
    _share_tensors(teacher, model, exchanged)
    generator = torch.Generator().manual_seed(student.seed)
    distances = attention_distances(teacher, exchanged, student)
    for index, mixer in exchanged.items():
        attention, layer = teacher.get_decoder().layers[index].self_attn, model.model.layers[index].self_attn
        weight = next(attention.parameters())
        layer.to_empty(device=weight.device).to(weight.dtype)
        start = Start(student.initialization, teacher.config.initializer_range, generator, distances.get(index))
        mixer.initialize(layer, attention, start)
    model.tie_weights()
    model.eval()
    if student.initialization.output_scale == "fitted":
        calibrate_layers(teacher, model, generator)
    model.generation_config = copy.deepcopy(teacher.generation_config)
    return model


def exchanged_layers(model: KDAHybridForCausalLM) -> dict[int, Mixer]:
    """The mixers of the layers whose attention is not the teacher's own, by layer."""
    return {index: mixer for index, mixer in enumerate(mixers_of(model.config)) if not mixer.keeps_teacher_weights}


def calibrate_layers(
    teacher: PreTrainedModel, model: KDAHybridForCausalLM, generator: torch.Generator | None = None
) -> None:
    """Fit every exchanged layer to the teacher's attention, each on what the teacher's layer is given."""
    exchanged = exchanged_layers(model)
    attention = _attention(teacher, exchanged)
    projections = {index: module.get_submodule("o_proj") for index, module in attention.items()}
    input_ids = calibration_tokens(model.config.vocab_size, generator)
    with recorded(attention, _input) as given, recorded(projections, _input) as attention_outputs:
        _run_decoder(teacher, input_ids)
    for index, mixer in exchanged.items():
        mixer.calibrate(model.model.layers[index].self_attn, given[index], attention_outputs[index])


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
    exchanged = tuple(f"model.layers.{index}.self_attn." for index in layers)
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


def _attention(model: PreTrainedModel, layers: Iterable[int]) -> dict[int, nn.Module]:
    return {index: model.get_decoder().layers[index].self_attn for index in layers}


@torch.no_grad()
def _run_decoder(teacher: PreTrainedModel, input_ids: Tensor) -> None:
    """For what is recorded meanwhile."""
    teacher.get_decoder()(input_ids=input_ids.to(teacher.get_input_embeddings().weight.device), use_cache=False)


def _input(call: Call) -> Tensor:
    return call.input


@contextmanager
def _whole_or_not_at_all(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place once everything is in it."""
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
