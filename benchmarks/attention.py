"""Packed documents through a transformer: SDPA with transformers' mask against varlen attention.

    python benchmarks/attention.py                     # on CUDA
    python benchmarks/attention.py --device cpu --tokens 512 --output small.json

A Llama of SmolLM2-135M's shapes with random weights, decoder only, bf16 on CUDA and float32 elsewhere; forward and
backward of one row of documents with lengths drawn from 64 to 1,024.
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from distillkit.models.decoder import decode
from distillkit.models.varlen_attention import VARLEN
from frame import DEVICE, MIB, Json, Options, option, peak_memory, run, seconds_of, start_peak
from steps import SMOLLM2, random_model


@dataclass(kw_only=True)
class AttentionOptions(Options):
    tokens: list[int] = option([2048, 8192, 32768])
    layers: int = option(30)
    device: str = option(DEVICE.type)


def measure(options: AttentionOptions) -> Iterator[Json]:
    for tokens in options.tokens:
        for implementation in ("sdpa", VARLEN):
            yield {"attention": implementation, "tokens": tokens, **measured(implementation, tokens, options)}


def measured(implementation: str, tokens: int, options: AttentionOptions) -> Json:
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model({**SMOLLM2, "num_hidden_layers": options.layers}, dtype, device)
    model.set_attn_implementation(implementation)
    input_ids, position_ids = packed_documents(tokens, device)

    def step() -> None:
        decode(model, input_ids, position_ids)[0].float().square().mean().backward()

    start_peak(device)
    try:
        seconds = seconds_of(step, repeats=5, warm_up=1)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    return {
        "documents": int((position_ids == 0).sum()),
        "tokens_per_second": round(tokens / statistics.median(seconds)),
        "peak_mib": round(peak_memory(device) / MIB),
    }


def packed_documents(tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and positions of one row."""
    generator = torch.Generator().manual_seed(0)
    positions: list[torch.Tensor] = []
    while (filled := sum(map(len, positions))) < tokens:
        length = int(torch.randint(64, 1025, (), generator=generator))
        positions.append(torch.arange(min(length, tokens - filled)))
    input_ids = torch.randint(49152, (1, tokens), generator=generator)
    return input_ids.to(device), torch.cat(positions).unsqueeze(0).to(device)


if __name__ == "__main__":
    title = "forward and backward of a Llama of SmolLM2-135M's shapes over one row of packed documents"
    run(AttentionOptions, measure, title)
