"""Peak memory and time of cross-entropy + kl, forward and backward: all logits at once against the chunked head.

    python benchmarks/losses.py                       # 2k, 8k and 32k tokens x 49,152 columns; writes the JSON
    python benchmarks/losses.py --tokens 512 1024 --output small.json

Teacher and student are hidden states and a trainable head each, so both sides make logits. Every configuration runs in
a process of its own; its memory is the peak resident size of that process less the peak before the losses began (the
inputs, and a warm-up of 64 tokens x 1,024 columns). One that does not fit into
free memory is recorded so.
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
from distillkit.losses import DISTRIBUTION_LOSSES, DistributionTerm, chunked_vocabulary_losses
from distillkit.losses.objective import CPU_CHUNK_BYTES
from distillkit.losses.vocabulary_head import chunk_tokens_within

TERMS = [
    DistributionTerm("cross_entropy", "cross_entropy", 0.5),
    DistributionTerm("kl", "kl", 0.5, {"temperature": 2.0}),
]
METHODS = ("dense", "chunked")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden-size", type=int, default=576)
    parser.add_argument("--output", type=Path, default=RESULTS / "losses.json")
    parser.add_argument("--method", choices=METHODS, help="measure this one, in this process, and print the result")
    arguments = parser.parse_args()
    if arguments.method:
        sizes = (arguments.tokens[0], arguments.vocabulary, arguments.hidden_size)
        print(json.dumps(measure(arguments.method, *sizes)))
        return
    sizes = ("--vocabulary", arguments.vocabulary, "--hidden-size", arguments.hidden_size)
    rows = [
        in_own_process(__file__, "--method", method, "--tokens", tokens, *sizes)
        for tokens in arguments.tokens
        for method in METHODS
    ]
    result = {
        "benchmark": "cross_entropy + kl at temperature 2, forward and backward, float32, trainable head",
        **provenance(),
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def measure(method: str, tokens: int, vocabulary: int, hidden_size: int) -> dict[str, Any]:
    free = free_memory()
    # Beyond this an allocation fails, instead of pushing the machine into swapping or the killer.
    resource.setrlimit(resource.RLIMIT_DATA, (int(0.95 * free),) * 2)
    run = {"dense": dense, "chunked": chunked}[method]
    row: dict[str, Any] = {"method": method, "tokens": tokens, "vocabulary": vocabulary, "hidden_size": hidden_size}
    if method == "chunked":
        row["chunk_tokens"] = chunk_tokens_within(CPU_CHUNK_BYTES, vocabulary)
    run(*inputs(64, 1024, hidden_size))
    problem = inputs(tokens, vocabulary, hidden_size)
    baseline, started = peak_memory(), time.perf_counter()
    try:
        loss = run(*problem)
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        return row | {"peak_mib": None, "seconds": None, "error": f"does not fit into {free / MIB:.0f} MiB"}
    seconds = time.perf_counter() - started
    return row | {"peak_mib": round((peak_memory() - baseline) / MIB, 1), "seconds": round(seconds, 3), "loss": loss}


def inputs(tokens: int, vocabulary: int, hidden_size: int) -> tuple[torch.Tensor, ...]:
    """Hidden states and head of the student and of the teacher, and labels."""
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(tokens, hidden_size, generator=generator) for _ in range(2))
    head, teacher_head = (torch.randn(vocabulary, hidden_size, generator=generator).div_(20) for _ in range(2))
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden.requires_grad_(), head.requires_grad_(), teacher_hidden, teacher_head, labels


def dense(hidden: Any, head: Any, teacher_hidden: Any, teacher_head: Any, labels: Any) -> float:
    logits = F.linear(hidden, head)
    teacher = DenseDistribution(F.linear(teacher_hidden, teacher_head))
    loss = torch.zeros(())
    for term in TERMS:
        sums, _ = DISTRIBUTION_LOSSES[term.function](logits, teacher, labels, **term.options)
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
        chunk_tokens_within(CPU_CHUNK_BYTES, len(head)),
    )
    loss.backward()
    return loss.item()


if __name__ == "__main__":
    main()
