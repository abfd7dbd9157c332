"""Peak memory and time of cross-entropy + kl, forward and backward: all logits at once against the chunked head.

    python benchmarks/losses.py                       # 2k, 8k and 32k tokens x 49,152 columns; writes the JSON
    python benchmarks/losses.py --tokens 512 1024 --output small.json
    python benchmarks/losses.py --device cuda --output losses_cuda.json

Teacher and student are hidden states and a trainable head each, so both sides make logits. Every configuration runs in
a process of its own; its memory is the peak less what there was before the losses began (the inputs, and a warm-up of
64 tokens x 1,024 columns): resident size on the CPU, PyTorch's allocations on CUDA. So it holds the gradients of
hidden states and head, whose sizes are recorded beside it. What does not fit into free memory is recorded so.

The summary gives, for each number of tokens, how many times the chunked head's memory the dense one needs; and by how
much the chunked head's memory grows from the fewest tokens to the most, in copies of the hidden states: a few, where
nothing else grows.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import MIB, RESULTS, free_memory, in_own_process, peak_memory, provenance

from distillkit.distribution import DenseDistribution
from distillkit.losses import DISTRIBUTION_LOSSES, LossTerm, chunked_vocabulary_losses
from distillkit.losses.objective import CPU_CHUNK_BYTES, CUDA_CHUNK_BYTES
from distillkit.models.chunked_logits import chunk_tokens_within

TERMS = [
    LossTerm("cross_entropy", DISTRIBUTION_LOSSES["cross_entropy"], 0.5),
    LossTerm("kl", DISTRIBUTION_LOSSES["kl"], 0.5, {"temperature": 2.0}),
]
METHODS = ("dense", "chunked")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden-size", type=int, default=576)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "losses.json")
    parser.add_argument("--method", choices=METHODS, help="measure this one, in this process, and print the result")
    arguments = parser.parse_args()
    if arguments.method:
        sizes = (arguments.tokens[0], arguments.vocabulary, arguments.hidden_size)
        print(json.dumps(measure(arguments.method, *sizes, torch.device(arguments.device))))
        return
    sizes = ("--vocabulary", arguments.vocabulary, "--hidden-size", arguments.hidden_size, "--device", arguments.device)
    rows = [
        in_own_process(__file__, "--method", method, "--tokens", tokens, *sizes)
        for tokens in arguments.tokens
        for method in METHODS
    ]
    result = {
        "benchmark": "cross_entropy + kl at temperature 2, forward and backward, float32, trainable head",
        "device": arguments.device,
        **provenance(),
        "summary": summary(rows),
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the two claims are about: the ratio of the two methods, and the growth of the second."""
    peaks = {(row["method"], row["tokens"]): row["peak_mib"] for row in rows}
    chunked_rows = sorted((row for row in rows if row["method"] == "chunked"), key=lambda row: row["tokens"])
    fewest, most = chunked_rows[0], chunked_rows[-1]
    growth = most["peak_mib"] - fewest["peak_mib"]
    copy = max(most["hidden_states_mib"] - fewest["hidden_states_mib"], 1 / MIB)
    return {
        "dense_over_chunked": {
            str(tokens): round(peak / peaks["chunked", tokens], 1)
            for (method, tokens), peak in peaks.items()
            if method == "dense" and peak is not None
        },
        "chunked_growth_mib": round(growth, 1),
        "chunked_growth_in_copies_of_the_hidden_states": round(growth / copy, 2),
    }


def measure(method: str, tokens: int, vocabulary: int, hidden_size: int, device: torch.device) -> dict[str, Any]:
    on_cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info()[0] if on_cuda else free_memory()
    if not on_cuda:
        # Beyond this an allocation fails, instead of pushing the machine into swapping or the killer.
        resource.setrlimit(resource.RLIMIT_DATA, (int(0.95 * free),) * 2)
    run = {"dense": dense, "chunked": chunked}[method]
    row: dict[str, Any] = {
        "method": method,
        "tokens": tokens,
        "vocabulary": vocabulary,
        "hidden_size": hidden_size,
        "hidden_states_mib": round(4 * tokens * hidden_size / MIB, 1),
        "head_mib": round(4 * vocabulary * hidden_size / MIB, 1),
    }
    if method == "chunked":
        row["chunk_tokens"] = chunk_tokens(vocabulary, device)
    run(*inputs(64, 1024, hidden_size, device))
    problem = inputs(tokens, vocabulary, hidden_size, device)
    baseline, started = begin(device), time.perf_counter()
    try:
        loss = run(*problem)
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        return row | {"peak_mib": None, "seconds": None, "error": f"does not fit into {free / MIB:.0f} MiB"}
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if on_cuda else peak_memory()
    return row | {"peak_mib": round((peak - baseline) / MIB, 1), "seconds": round(seconds, 3), "loss": loss}


def begin(device: torch.device) -> int:
    """Bytes in use before the losses begin."""
    if device.type == "cpu":
        return peak_memory()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    return chunk_tokens_within(CPU_CHUNK_BYTES if device.type == "cpu" else CUDA_CHUNK_BYTES, vocabulary)


def inputs(tokens: int, vocabulary: int, hidden_size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Hidden states and head of the student and of the teacher, and labels."""
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(tokens, hidden_size, generator=generator) for _ in range(2))
    head, teacher_head = (torch.randn(vocabulary, hidden_size, generator=generator).div_(20) for _ in range(2))
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    made = [tensor.to(device) for tensor in (hidden, head, teacher_hidden, teacher_head, labels)]
    made[0].requires_grad_()
    made[1].requires_grad_()
    return tuple(made)


def dense(hidden: Any, head: Any, teacher_hidden: Any, teacher_head: Any, labels: Any) -> float:
    logits = F.linear(hidden, head)
    teacher = DenseDistribution(F.linear(teacher_hidden, teacher_head))
    loss = torch.zeros((), device=logits.device)
    for term in TERMS:
        sums, _ = term.function(logits, teacher, labels, **term.options)
        loss = loss + term.weight * sums.mean()
    loss.backward()
    return loss.item()


def chunked(hidden: Any, head: Any, teacher_hidden: Any, teacher_head: Any, labels: Any) -> float:
    loss, _, _ = chunked_vocabulary_losses(
        hidden,
        head,
        None,
        labels,
        lambda rows: DenseDistribution(F.linear(teacher_hidden[rows], teacher_head)),
        TERMS,
        {term.name: len(labels) for term in TERMS},
        chunk_tokens(len(head), hidden.device),
    )
    loss.backward()
    return loss.item()


if __name__ == "__main__":
    main()
