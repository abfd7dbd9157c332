"""Accelerators that a run may be planned for, and how long its work would take there."""

import math
import os
from dataclasses import dataclass

import torch

from distillkit.config import UserError
from distillkit.formatting import GIB

CONTEXT = 0.8 * GIB
"""What CUDA, cuBLAS and compiled kernels take beside PyTorch's own memory."""

FRAGMENTS = 0.04
"""What PyTorch's allocator holds and cannot use, as a share of activations and gradients."""


NETWORK = 50e9
"""Bytes per second and GPU between nodes, in one direction: 400 Gb/s, one adapter for each GPU as in a DGX H100."""

LINK_SHARE = 0.8
"""The share of links and network that collectives of large tensors reach: 370 of NVLink's 450 GB/s, as NCCL's
developers have it (github.com/NVIDIA/nccl-tests/issues/212). Not measured here."""


@dataclass(frozen=True)
class GPU:
    """memory: bytes that programs can have. tflops: dense bf16 matrix products, accumulated in float32, as its maker
    has them (NVIDIA's data sheets). For a CPU, what design measurements gave for two cores. link: bytes per second, in
    one direction, to the other GPUs of a node: NVLink, or PCIe where that is all that a server of eight has."""

    name: str
    memory: float
    tflops: float
    link: float

    @property
    def cuda(self) -> bool:
        return self.name != "CPU"

    @property
    def float8(self) -> bool:
        """Whether it multiplies float8: NVIDIA's do from Ada and Hopper on."""
        return self.name not in _WITHOUT_FLOAT8


_TABLE = {
    "A100-40GB": (39.4, 312.0, 300.0),
    "A100-80GB": (79.1, 312.0, 300.0),
    "H100": (79.1, 989.0, 450.0),
    "H100-PCIe": (79.1, 756.0, 64.0),
    "H200": (139.8, 989.0, 450.0),
    "B200": (178.0, 2250.0, 900.0),
    "L40S": (44.4, 362.0, 32.0),
    "L4": (22.0, 121.0, 32.0),
    "A10G": (22.0, 70.0, 32.0),
    "RTX-A6000": (47.4, 155.0, 32.0),
    "RTX-5090": (31.4, 209.0, 64.0),
    "RTX-4090": (23.5, 165.0, 32.0),
    "RTX-3090": (23.5, 71.0, 32.0),
}

_WITHOUT_FLOAT8 = ("A100-40GB", "A100-80GB", "A10G", "RTX-A6000", "RTX-3090")

_EAGER = ((576, 0.060), (2560, 0.24))
_COMPILED = ((576, 0.16), (2560, 0.43))
"""(hidden size, share of the peak) of all but attention in runs on one H100 (benchmarks/results: memory.json,
throughput.json, throughput_smollm2.json, replication.json), by this plan's count of operations: SmolLM2-135M and
AFM-4.5B's shapes. Between the two by the logarithm of the size; not beyond. Nothing was measured on other GPUs."""

_LAUNCHING = 0.0175
"""Seconds that a processor takes, per layer of the student, to start the kernels of a micro-batch, however small it is:
the student's two passes and the teacher's. Compiled, 0.0185 at SmolLM2's shapes, where the GPU waits for them more than
half of a step, and at most 0.0172 at AFM-4.5B's, where it hardly does."""

_ATTENTION_SHARE = 0.29
"""The share of flash attention, heads of 64 numbers: what rows of 32,768 tokens took longer than those of 2,048."""

_FLOAT8 = 1.5
"""How many times faster products in float8 are than those in bf16, in compiled layers, their scales included: teacher
and frozen MLPs at AFM-4.5B's shapes, one H100. Eager ones, which were not measured, are counted as bf16's."""

_CPU_TFLOPS = 0.2
"""SmolLM2-135M on two cores: 730 tokens/s forward, in bf16."""


def find_gpu(name: str) -> GPU:
    """The accelerator of this name; `cpu` is this machine without one. Raises `UserError` for another."""
    wanted = _plain(name)
    if wanted == "cpu":
        memory = 1.0 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return GPU("CPU", memory, _CPU_TFLOPS, 10e9)
    aliases = {"a100": "a10080gb", "a10040": "a10040gb", "a10080": "a10080gb", "h10080gb": "h100", "4090": "rtx4090"}
    aliases |= {"3090": "rtx3090", "5090": "rtx5090", "a6000": "rtxa6000", "h100sxm": "h100"}
    wanted = aliases.get(wanted, wanted)
    for known, (memory, tflops, link) in _TABLE.items():
        if _plain(known) == wanted:
            return GPU(known, memory * GIB, tflops, link * 1e9)
    raise UserError("--gpu", f"{name!r} is not known; there is {', '.join(_TABLE)} and cpu")


def seconds(
    flops: float,
    attention: float,
    gpu: GPU,
    hidden_size: int,
    dtype: torch.dtype,
    *,
    compiled: bool = False,
    trained_layers: int = 0,
    float8: float = 0.0,
) -> float | None:
    """Estimated time of so many operations; not for float32, whose peak rates differ.

    attention, float8: those of the operations that are softmax attention, and products in float8. trained_layers: of a
    student whose layers run forward and backward; their kernels take a processor some time to start.
    """
    if not gpu.cuda:
        return flops / (gpu.tflops * 1e12)
    if dtype == torch.float32:
        return None
    peak = gpu.tflops * 1e12
    other = flops - attention - (float8 * (1 - 1 / _FLOAT8) if compiled else 0.0)
    work = other / (peak * share_of_peak(hidden_size, compiled)) + attention / (peak * _ATTENTION_SHARE)
    return max(work, trained_layers * _LAUNCHING)


def share_of_peak(hidden_size: int, compiled: bool) -> float:
    """The share of a GPU's peak that training reaches; narrow models reach less."""
    (narrow, low), (wide, high) = _COMPILED if compiled else _EAGER
    place = math.log(hidden_size / narrow) / math.log(wide / narrow)
    return low + (high - low) * min(max(place, 0.0), 1.0)


def _plain(name: str) -> str:
    kept = "".join(letter for letter in name.lower() if letter.isalnum())
    return kept.removeprefix("nvidia").removeprefix("geforce")
