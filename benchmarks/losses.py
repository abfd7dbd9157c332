"""Peak memory and time of cross-entropy + kl, forward and backward: all logits at once against the chunked head.

    python benchmarks/losses.py                       # 2k, 8k and 32k tokens x 49,152 columns
    python benchmarks/losses.py --device cuda --output losses_cuda.json

Teacher and student are hidden states and a trainable head each, so both make logits. Every measurement runs in a
process of its own; its memory is the peak less what there was before the losses began (the inputs, and a warm-up of
64 tokens x 1,024 columns): resident size on the CPU, PyTorch's allocations on CUDA. So it includes the gradients of
hidden states and head, whose sizes are recorded beside it. What does not fit into free memory is recorded so.
"""

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
import torch.nn.functional as F

from distillkit.distribution import DenseDistribution
from distillkit.losses import DISTRIBUTION_LOSSES, LossTerm, chunked_vocabulary_losses
from distillkit.losses.objective import CPU_CHUNK_BYTES, CUDA_CHUNK_BYTES
from distillkit.models.chunked_logits import chunk_tokens_within
from frame import MIB, Json, Options, in_own_process, now, option, peak_memory, run, start_peak

TERMS = [
    LossTerm("cross_entropy", DISTRIBUTION_LOSSES["cross_entropy"], 0.5),
    LossTerm("kl", DISTRIBUTION_LOSSES["kl"], 0.5, {"temperature": 2.0}),
]


@dataclass(kw_only=True)
class LossesOptions(Options):
    tokens: list[int] = option([2048, 8192, 32768])
    vocabulary: int = option(49152)
    hidden_size: int = option(576)
    device: Literal["cpu", "cuda"] = option("cpu")


def measure(options: LossesOptions) -> Iterator[Json]:
    for tokens in options.tokens:
        for method in ("dense", "chunked"):
            yield in_own_process(measured, method, tokens, options.vocabulary, options.hidden_size, options.device)


def settings(options: LossesOptions, _: list[Json]) -> Json:
    return {"device": options.device}


def measured(method: str, tokens: int, vocabulary: int, hidden_size: int, device_name: str) -> Json:
    device = torch.device(device_name)
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
    if device.type == "cpu":
        # Beyond this an allocation fails, instead of making the machine swap or kill processes.
        resource.setrlimit(resource.RLIMIT_DATA, (int(0.95 * free),) * 2)
    losses = {"dense": dense, "chunked": chunked}[method]
    row: Json = {"method": method, "tokens": tokens, "vocabulary": vocabulary, "hidden_size": hidden_size}
    row["hidden_states_mib"] = round(4 * tokens * hidden_size / MIB, 1)
    row["head_mib"] = round(4 * vocabulary * hidden_size / MIB, 1)
    if method == "chunked":
        row["chunk_tokens"] = chunk_tokens(vocabulary, device)
    losses(*inputs(64, 1024, hidden_size, device))
    problem = inputs(tokens, vocabulary, hidden_size, device)
    before, started = start_peak(device), now()
    try:
        loss = losses(*problem)
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        return row | {"peak_mib": None, "seconds": None, "error": f"does not fit into {free / MIB:.0f} MiB"}
    seconds, peak = now() - started, peak_memory(device) - before
    return row | {"peak_mib": round(peak / MIB, 1), "seconds": round(seconds, 3), "loss": loss}


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    return chunk_tokens_within(CPU_CHUNK_BYTES if device.type == "cpu" else CUDA_CHUNK_BYTES, vocabulary)


def inputs(tokens: int, vocabulary: int, hidden_size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Hidden states and head of the student and of the teacher, and labels."""
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(tokens, hidden_size, generator=generator) for _ in range(2))
    head, teacher_head = (torch.randn(vocabulary, hidden_size, generator=generator).div_(20) for _ in range(2))
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    made = [tensor.to(device) for tensor in (hidden, head, teacher_hidden, teacher_head, labels)]
    return made[0].requires_grad_(), made[1].requires_grad_(), *made[2:]


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
    title = "cross_entropy + kl at temperature 2, forward and backward, float32, trainable head"
    run(LossesOptions, measure, title, more=settings)
