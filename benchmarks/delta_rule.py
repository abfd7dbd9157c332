"""Memory and time of KDA in PyTorch, forward and backward, against the number of tokens.

    python benchmarks/delta_rule.py

9 heads of 64, as in SmolLM2-135M, float32, one sequence; transformers' own PyTorch form
(``chunk_kimi_delta_attention``) beside ours. Every measurement runs in a process of its own; its memory is the whole
peak of that process, the 150 to 300 MiB of Python and torch included, and the same less the peak before the call.
"""

import argparse
import json
import time

import torch
from measuring import MIB, RESULTS, in_own_process, peak_memory, provenance

HEADS, HEAD_DIM = 9, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--fallback-tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--measure", choices=("distillkit", "transformers"), help="measure this one and print the row")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.tokens[0])))
        return
    runs = [("distillkit", n) for n in arguments.tokens] + [("transformers", n) for n in arguments.fallback_tokens]
    rows = [in_own_process(__file__, "--measure", form, "--tokens", tokens) for form, tokens in runs]
    result = {
        "benchmark": f"KDA forward and backward, {HEADS} heads of {HEAD_DIM}, float32, CPU",
        "command": "python benchmarks/delta_rule.py",
        **provenance(),
        "rows": rows,
    }
    (RESULTS / "delta_rule.json").write_text(json.dumps(result, indent=2) + "\n")


def measure(form: str, tokens: int) -> dict[str, object]:
    run = {"distillkit": ours, "transformers": theirs}[form]
    torch.manual_seed(0)
    step(run, inputs(64))
    sequence = inputs(tokens)
    before, started = peak_memory(), time.perf_counter()
    step(run, sequence)
    seconds = time.perf_counter() - started
    peak = peak_memory()
    return {
        "form": form,
        "tokens": tokens,
        "peak_mib": round(peak / MIB),
        "peak_above_inputs_mib": round((peak - before) / MIB),
        "seconds": round(seconds, 2),
    }


def inputs(tokens: int) -> list[torch.Tensor]:
    shape = (1, tokens, HEADS, HEAD_DIM)
    query, key, value = (torch.randn(shape) for _ in range(3))
    decay, beta = -torch.rand(shape), torch.rand(shape[:-1])
    return [x.requires_grad_() for x in (query, key, value, decay, beta)]


def step(run, sequence: list[torch.Tensor]) -> None:
    run(*sequence).square().mean().backward()


def ours(*sequence: torch.Tensor) -> torch.Tensor:
    from distillkit.student.network.delta_rule import chunk_kda

    return chunk_kda(*sequence)[0]


def theirs(*sequence: torch.Tensor) -> torch.Tensor:
    from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention

    return chunk_kimi_delta_attention(*sequence, use_qk_l2norm_in_kernel=True)[0]


if __name__ == "__main__":
    main()
