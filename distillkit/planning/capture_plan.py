"""What a capture would cost: the teacher's pass over the text, and the bytes of its stored outputs."""

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from distillkit.compression import build_codec
from distillkit.config import UserError
from distillkit.config.capture import CaptureConfig, check_capture_ready, check_shard_size
from distillkit.models.decoder import head
from distillkit.models.varlen_attention import VARLEN
from distillkit.planning.gpus import CONTEXT, GPU, find_gpu, seconds
from distillkit.planning.ledger import Ledger, without_data
from distillkit.planning.meta_models import check_files, read_config, teacher_on_meta, transformers_silenced
from distillkit.planning.result import CapturePlan
from distillkit.planning.tokens import amount

_TOKEN = 4
"""Bytes of a token's id beside its outputs; labels are stored only where they differ."""


@transformers_silenced()
def plan_capture(config: CaptureConfig, *, gpu: str = "H100") -> CapturePlan:
    """The plan of a capture. Raises `UserError` where the teacher's configuration cannot be read."""
    device = find_gpu(gpu)
    teacher_config = read_config(config.teacher.path, "teacher.path", config.teacher.kwargs, config.trust_remote_code)
    check_files(config.teacher.path, "teacher.path", teacher_config, config.teacher.kwargs, config.trust_remote_code)
    teacher = teacher_on_meta(teacher_config, config.teacher, config.trust_remote_code)
    parameters = sum(parameter.numel() for parameter in teacher.parameters())
    rows = head(teacher)[0].shape[0]
    codec = build_codec(config.compression.kind, config.compression.config)
    available = amount(config.dataset)
    memory, flops, attention = _pass(config, teacher, device)
    per_batch = seconds(flops, attention, device, teacher_config.hidden_size, teacher.dtype)
    speed = None if per_batch is None else config.tokens_per_batch / per_batch
    width = codec.bytes_per_token + _TOKEN
    disk = None if available is None else available.tokens * width + 4 * rows
    return CapturePlan(
        gpu=device,
        teacher=config.teacher.path,
        teacher_parameters=parameters,
        available=available,
        bytes_per_token=codec.bytes_per_token,
        disk=disk,
        memory=memory + CONTEXT,
        gflops_per_token=flops / config.tokens_per_batch / 1e9,
        tokens_per_second=speed,
        seconds=None if available is None or speed is None else available.tokens / speed,
        errors=list(_errors(config, codec.vocabulary_size, codec.bytes_per_token, rows)),
        warnings=list(_warnings(config, teacher, teacher_config.max_position_embeddings)),
    )


def _pass(config: CaptureConfig, teacher: PreTrainedModel, gpu: GPU) -> tuple[int, float, float]:
    """Bytes at the worst moment of a batch, its operations, and those of attention.

    The worst moment: hidden states of all rows, then a row's logits in float32.
    """
    ledger = Ledger()
    rows = max(config.tokens_per_batch // config.sequence_length, 1)
    with ledger, torch.no_grad():
        without_data(teacher, ledger, "teacher weights")
        if gpu.cuda and teacher.dtype in (torch.bfloat16, torch.float16):
            teacher.set_attn_implementation(VARLEN)
        input_ids = torch.zeros(1, rows * config.sequence_length, dtype=torch.long)
        position_ids = torch.arange(config.sequence_length).repeat(1, rows)
        output = teacher.get_decoder()(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        logits = teacher.get_output_embeddings()(output.last_hidden_state[:, : config.sequence_length])
        del output, logits
    peak = sum(ledger.peak.values())
    weight, _ = head(teacher)
    done = rows * config.sequence_length
    outside_of_head = sum(ledger.flops.values()) - 2 * config.sequence_length * weight.numel()
    flops = (outside_of_head / done + 2 * weight.numel()) * config.tokens_per_batch
    attention = ledger.attention_flops / done * config.tokens_per_batch
    return int(peak + 2 * 4 * config.sequence_length * weight.shape[0]), flops, attention


def _errors(config: CaptureConfig, vocabulary: int, width: int, rows: int) -> Iterator[str]:
    for check in (lambda: check_capture_ready(config), lambda: check_shard_size(config, width)):
        try:
            check()
        except UserError as error:
            yield str(error)
    if vocabulary != rows:
        key = f"compression.{config.compression.kind}.{config.compression.vocabulary_key}"
        yield f"{key}: is {vocabulary}, but the teacher's head has {rows} columns; use {rows}"


def _warnings(config: CaptureConfig, teacher: PreTrainedModel, reach: int) -> Iterator[str]:
    if teacher.dtype == torch.float32:
        yield "teacher.kwargs.dtype: the teacher is loaded in float32, at twice the memory; set dtype: bfloat16"
    if config.sequence_length > reach:
        yield f"sequence_length: {config.sequence_length:,} tokens, but the teacher was trained for {reach:,}; lower it"
    if config.tokens_per_batch % config.sequence_length:
        yield (
            f"tokens_per_batch: {config.tokens_per_batch:,} is no multiple of sequence_length "
            f"{config.sequence_length:,}, so that batches are smaller; use a multiple"
        )
    output = Path(config.output_path).expanduser()
    if output.is_dir() and any(output.iterdir()):
        yield f"output_path: {config.output_path!r} is not empty; a capture that was begun there goes on"
