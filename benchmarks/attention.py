"""Packed documents through a transformer: SDPA with transformers' mask against varlen attention.

    python benchmarks/attention.py                     # on CUDA; writes the JSON
    python benchmarks/attention.py --device cpu --tokens 512 --output small.json

A Llama of SmolLM2-135M's shapes with random weights (30 layers, 9 query / 3 key-value heads of 64), decoder only, bf16
on CUDA and float32 elsewhere; forward and backward of one row of documents with lengths drawn from 64 to 1,024.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from measuring import MIB, RESULTS, peak_memory, provenance
from transformers import LlamaConfig, LlamaForCausalLM

from distillkit.models.decoder import decode
from distillkit.models.varlen_attention import VARLEN

REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "attention.json")
    arguments = parser.parse_args()
    rows = []
    for tokens in arguments.tokens:
        for implementation in ("sdpa", VARLEN):
            rows.append(measure(implementation, tokens, arguments.layers, torch.device(arguments.device)))
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "benchmark": "forward and backward of a Llama of SmolLM2-135M's shapes over one row of packed documents",
        "command": "python benchmarks/attention.py",
        **provenance(),
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def measure(implementation: str, tokens: int, layers: int, device: torch.device) -> dict[str, object]:
    row: dict[str, object] = {"attention": implementation, "tokens": tokens}
    model = llama(layers).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.set_attn_implementation(implementation)
    batch = documents(tokens, device)
    try:
        seconds = [step(model, batch) for _ in range(REPEATS + 1)][1:]
    except torch.OutOfMemoryError:
        return row | {"error": "out of memory"}
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory()
    return row | {
        "documents": int((batch[1] == 0).sum()),
        "tokens_per_second": round(tokens / statistics.median(seconds)),
        "peak_mib": round(peak / MIB),
    }


def step(model: LlamaForCausalLM, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Seconds of one forward and backward pass."""
    on_cuda = batch[0].is_cuda
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = time.perf_counter()
    decode(model, *batch)[0].float().square().mean().backward()
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def llama(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def documents(tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and positions of one row."""
    generator = torch.Generator().manual_seed(0)
    positions: list[torch.Tensor] = []
    while (filled := sum(map(len, positions))) < tokens:
        length = int(torch.randint(64, 1025, (), generator=generator))
        positions.append(torch.arange(min(length, tokens - filled)))
    input_ids = torch.randint(49152, (1, tokens), generator=generator)
    return input_ids.to(device), torch.cat(positions).unsqueeze(0).to(device)


if __name__ == "__main__":
    main()
