"""A teacher becomes an untrained student: the same network, with Kimi Delta Attention in place of some attention.

The student is laid out without memory and given the teacher's own tensors, so a conversion holds the teacher and the
new layers, and nothing twice.
"""

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from distillkit.config import StudentConfig, UserError
from distillkit.conversion.layouts import layer_types
from distillkit.conversion.summary import ConversionSummary, summarize
from distillkit.models.decoder import check_head
from distillkit.models.loading import load_model, load_tokenizer, where
from distillkit.student.mixers.kda.initialize import (
    calibration_tokens,
    copy_attention,
    fit_output_scale,
    initialize_new_parameters,
    mean_attention_distance,
    repeated_tokens,
)
from distillkit.student.network import KDAHybridConfig, KDAHybridForCausalLM

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
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
    check_teacher(teacher)
    check_head(teacher, "teacher")
    model = student_on_meta(teacher.config, student)
    _share_tensors(teacher, model)
    generator = torch.Generator().manual_seed(student.seed)
    layers, std = linear_layers(model), teacher.config.initializer_range
    distances: dict[int, Tensor] = {}
    if student.initialization.memory == "attended":
        length = min(
            ATTENTION_DISTANCE_TOKENS, getattr(teacher.config, "max_position_embeddings", ATTENTION_DISTANCE_TOKENS)
        )
        own_generator = torch.Generator().manual_seed(student.seed)  # what is drawn next is the same without this
        input_ids = repeated_tokens(model.config.vocab_size, length, own_generator)
        distances = attended_distances(teacher, layers, input_ids)
    for index in layers:
        attention, kda = teacher.get_decoder().layers[index].self_attn, model.model.layers[index].self_attn
        kda.to_empty(device=attention.q_proj.weight.device).to(attention.q_proj.weight.dtype)
        copy_attention(kda, attention)
        initialize_new_parameters(kda, student.initialization, std, generator, distances.get(index))
    model.tie_weights()
    model.eval()
    if student.initialization.output_scale == "fitted":
        fit_output_scales(teacher, model, generator)
    model.generation_config = copy.deepcopy(teacher.generation_config)
    return model


def fit_output_scales(
    teacher: PreTrainedModel, model: KDAHybridForCausalLM, generator: torch.Generator | None = None
) -> None:
    """Fit every KDA layer's output to the teacher's attention, each on what the teacher's layer is given."""
    input_ids = calibration_tokens(model.config.vocab_size, generator)
    traffic = _attention_traffic(teacher, linear_layers(model), input_ids)
    for index, (hidden_states, attention_output) in traffic.items():
        fit_output_scale(model.model.layers[index].self_attn, hidden_states, attention_output)


def linear_layers(model: KDAHybridForCausalLM) -> list[int]:
    """Indices of the layers whose attention is KDA."""
    return [index for index, kind in enumerate(model.config.layer_types) if kind == "linear_attention"]


@torch.no_grad()
def attended_distances(teacher: PreTrainedModel, layers: list[int], input_ids: Tensor) -> dict[int, Tensor]:
    """Tokens that each head of some layers looks back on average, `[heads]` on the CPU; no layer's weights are kept.

    Raises `UserError` for a teacher that does not tell its attention weights.
    """
    found: dict[int, Tensor] = {}
    decoder = teacher.get_decoder()

    def take_weights(attention: nn.Module, _: Any, output: tuple[Tensor, Tensor | None]) -> None:
        if output[1] is None:
            raise UserError(
                "student.initialization.memory",
                f"attended needs attention weights, which {type(teacher).__name__} does not tell; say spread",
            )
        found[places[attention]] = mean_attention_distance(output[1]).cpu()

    places = {decoder.layers[index].self_attn: index for index in layers}
    with ExitStack() as stack:
        for attention in places:
            stack.enter_context(attention.register_forward_hook(take_weights))
        stack.callback(teacher.set_attn_implementation, teacher.config._attn_implementation)
        teacher.set_attn_implementation("eager")  # no other tells its weights
        _read(teacher, input_ids)
    return found


def _read(teacher: PreTrainedModel, input_ids: Tensor) -> None:
    """Run the teacher's decoder for what its hooks take."""
    teacher.get_decoder()(input_ids=input_ids.to(teacher.get_input_embeddings().weight.device), use_cache=False)


def student_on_meta(teacher_config: PreTrainedConfig, student: StudentConfig) -> KDAHybridForCausalLM:
    """The student without memory for its weights, to be filled or counted."""
    base_config = copy.deepcopy(teacher_config)
    base_config.__dict__.pop("quantization_config", None)
    base_config._name_or_path = ""  # a folder of this machine is nobody else's business
    config = KDAHybridConfig(
        base_config=base_config,
        layer_types=layer_types(teacher_config.num_hidden_layers, student),
        kv_heads=student.kv_heads,
        use_rope=student.keep_rope,
        attn_implementation=teacher_config._attn_implementation,
        dtype=teacher_config.dtype,
    )
    with torch.device("meta"):
        return KDAHybridForCausalLM(config).to(teacher_config.dtype or torch.float32)


def check_teacher(teacher: PreTrainedModel) -> None:
    """Raise `UserError`, naming what is missing, for a model whose attention cannot be exchanged."""
    name = type(teacher).__name__
    if type(teacher.config) not in MODEL_MAPPING:
        raise UserError("teacher", f"{name} is no decoder of transformers' own and cannot be converted")
    layers = dict(teacher.get_decoder().named_children()).get("layers")
    if not isinstance(layers, nn.ModuleList):
        raise UserError("teacher", f"{name} cannot be converted: its decoder has no `layers`")
    for index, layer in enumerate(layers):
        place = f"{name} cannot be converted: layer {index}"
        attention = dict(layer.named_children()).get("self_attn")
        if attention is None:
            raise UserError("teacher", f"{place} has no self_attn")
        linear = {name: part for name, part in attention.named_children() if isinstance(part, nn.Linear)}
        if missing := [part for part in PROJECTIONS if part not in linear]:
            raise UserError("teacher", f"{place}.self_attn has no linear {', '.join(missing)}")
        if unknown := sorted({each.split(".")[0] for each, _ in attention.named_parameters()} - {*PROJECTIONS, *NORMS}):
            raise UserError("teacher", f"{place}.self_attn has {', '.join(unknown)}, for which KDA has no place")
        query, key, value = (linear[part].out_features for part in PROJECTIONS[:3])
        if query != linear["o_proj"].in_features or key != value:
            raise UserError("teacher", f"{place}.self_attn has heads of different sizes for queries, keys and values")


def _share_tensors(teacher: PreTrainedModel, model: KDAHybridForCausalLM) -> None:
    """Give the student every tensor of the teacher but those of the exchanged attention.

    Raises `UserError` where the two do not have the same names, apart from that attention.
    """
    exchanged = tuple(f"model.layers.{index}.self_attn." for index in linear_layers(model))
    kept = {name: tensor for name, tensor in teacher.state_dict().items() if not name.startswith(exchanged)}
    report = model.load_state_dict(kept, strict=False, assign=True)
    missing = [name for name in report.missing_keys if not name.startswith(exchanged)]
    if missing or report.unexpected_keys:
        difference = (missing + report.unexpected_keys)[0]
        raise UserError("teacher", f"{type(teacher).__name__} cannot be converted: no counterpart for {difference}")
    for name, buffer in teacher.named_buffers():  # those that are not in the state_dict: rotary frequencies
        if not name.startswith(exchanged):
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, buffer)


@torch.no_grad()
def _attention_traffic(
    teacher: PreTrainedModel, layers: list[int], input_ids: Tensor
) -> dict[int, tuple[Tensor, Tensor]]:
    """What the attention of each of the layers is given, and what its heads make of it before `o_proj`."""
    given: dict[int, Tensor] = {}
    made: dict[int, Tensor] = {}
    decoder = teacher.get_decoder()
    with ExitStack() as stack:
        for index in layers:
            attention = decoder.layers[index].self_attn

            def take_input(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], index: int = index) -> None:
                given[index] = args[0] if args else kwargs["hidden_states"]

            def take_output(_: nn.Module, args: tuple[Tensor, ...], index: int = index) -> None:
                made[index] = args[0]

            stack.enter_context(attention.register_forward_pre_hook(take_input, with_kwargs=True))
            stack.enter_context(attention.o_proj.register_forward_pre_hook(take_output))
        _read(teacher, input_ids)
    return {index: (given[index], made[index]) for index in layers}


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
