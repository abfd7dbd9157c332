"""Memory and time of KDA in PyTorch, forward and backward, against the number of tokens.

    python benchmarks/delta_rule.py

9 heads of 64, as in SmolLM2-135M, float32, one sequence; transformers' own PyTorch form
(`chunk_kimi_delta_attention`) beside ours. Every measurement runs in a process of its own; its memory is the whole
peak of that process, the 150 to 300 MiB of Python and torch included, and the same less the peak before the call.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention

from distillkit.student.network.delta_rule import chunk_kda
from frame import CPU, MIB, Json, Options, in_own_process, option, peak_memory, run, seconds_of

HEADS, HEAD_DIM = 9, 64


@dataclass(kw_only=True)
class DeltaRuleOptions(Options):
    tokens: list[int] = option([1024, 2048, 4096, 8192, 16384])
    fallback_tokens: list[int] = option([1024, 2048, 4096, 8192], "of transformers' form")


def measure(options: DeltaRuleOptions) -> Iterator[Json]:
    for form, lengths in (("distillkit", options.tokens), ("transformers", options.fallback_tokens)):
        for tokens in lengths:
            yield in_own_process(measured, form, tokens)


def measured(form: str, tokens: int) -> Json:
    torch.manual_seed(0)
    step(form, inputs(64))
    sequence = inputs(tokens)
    before = peak_memory(CPU)
    (seconds,) = seconds_of(lambda: step(form, sequence))
    peak = peak_memory(CPU)
    row = {"form": form, "tokens": tokens, "peak_mib": round(peak / MIB)}
    return {**row, "peak_above_inputs_mib": round((peak - before) / MIB), "seconds": round(seconds, 2)}


def inputs(tokens: int) -> list[torch.Tensor]:
    """Query, key, value, decay and beta."""
    shape = (1, tokens, HEADS, HEAD_DIM)
    query, key, value = (torch.randn(shape) for _ in range(3))
    decay, beta = -torch.rand(shape), torch.rand(shape[:-1])
    return [x.requires_grad_() for x in (query, key, value, decay, beta)]


def step(form: str, sequence: list[torch.Tensor]) -> None:
    if form == "distillkit":
        output = chunk_kda(*sequence)[0]
    else:
        output = chunk_kimi_delta_attention(*sequence, use_qk_l2norm_in_kernel=True)[0]
    output.square().mean().backward()


if __name__ == "__main__":
    run(DeltaRuleOptions, measure, f"KDA forward and backward, {HEADS} heads of {HEAD_DIM}, float32, CPU")
