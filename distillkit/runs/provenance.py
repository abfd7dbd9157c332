"""Where a number came from: versions, commit, machine, command. Every result file carries it."""

import os
import platform
import shlex
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from distillkit.runs.secrets import hide_in_words

PACKAGES = ("distillkit", "torch", "transformers", "accelerate", "datasets", "flash-linear-attention", "lm_eval")


def versions(*others: str) -> dict[str, str]:
    """Versions of what computes, and of other packages; those that are not installed are left out."""
    return {"python": platform.python_version(), **installed(*PACKAGES, *others)}


def installed(*packages: str) -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    return {name: found for name in packages if (found := _version(name)) is not None}


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def command() -> str:
    """The command line of this process, to be typed again; of a secret only that there was one."""
    name = Path(sys.argv[0]).name
    words = ["python", "-m", "distillkit"] if name == "__main__.py" else [name]
    if (count := processes()) > 1:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
        nodes = [f"--nnodes={count // here}"] if count > here else []
        words = ["torchrun", *nodes, f"--nproc-per-node={here}", "-m", "distillkit"]
    return shlex.join([*words, *hide_in_words(sys.argv[1:])])


def processes() -> int:
    """Those that torchrun started together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def commit() -> str | None:
    """The commit of the clone that the package runs from, and whether files differ; None outside of a clone."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return None
    return f"{head} with changes" if changed else head or None


def machine(device: torch.device) -> dict[str, str]:
    """The system, the name of the device that computed, and how many processes did so together."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    found = {"system": f"{platform.system()} {platform.machine()}", "device": name}
    return {**found, "processes": str(processes())} if processes() > 1 else found
