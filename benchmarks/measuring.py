"""What every benchmark shares: a process per measurement, its peak memory, and where a number came from."""

import json
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from distillkit.runs.provenance import commit, versions

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MIB = 2**20


def in_own_process(script: str, *arguments: object) -> dict[str, Any]:
    """Run ``python script arguments`` and return the JSON on its last line: no peak hides in an earlier one's."""
    command = [sys.executable, script, *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    row = json.loads(output.splitlines()[-1])
    print(json.dumps(row), flush=True)
    return row


def peak_memory() -> int:
    """Peak resident bytes of this process so far; Linux reports KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_memory() -> int:
    """Bytes that the machine could still hand out."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def provenance(*packages: str) -> dict[str, Any]:
    """Machine, versions (of what always computes, and of ``packages``) and commit."""
    return {"machine": _machine(), "versions": versions(*packages), "commit": commit()}


def _machine() -> dict[str, Any]:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    memory = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    machine: dict[str, Any] = {"cpu": cpu, "threads": torch.get_num_threads(), "memory_gib": round(memory / MIB)}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine
