"""What fla's kernels are tuned to, from files: a run then need not spend its first minutes on finding it out.

At their first call for a number and size of heads and a dtype (l2norm for a number of tokens, too) the kernels of
flash-linear-attention try out some hundreds of configurations, which takes two to five minutes on a new machine. fla
can read its choices from a folder. Those in `tuned` are named as fla names GPUs, and hold the heads of SmolLM2-135M and
of AFM-4.5B; what is not in there is tuned as ever. `python benchmarks/start_up.py --keep FOLDER` writes such files.
"""

import os
import re
from pathlib import Path

FOLDER = Path(__file__).parent / "tuned"
TUNED_WITH = "0.6.0"
"""The version of fla whose kernels these are; another may have others of the same name."""

_SAME_CHIP = {"NVIDIA H200": "NVIDIA H100 80GB HBM3"}
"""GPUs that take the configurations of another, from which they differ in their memory alone."""


def allow_tuned_kernels() -> None:
    """To be called before fla is imported, which is when it reads this: configurations for exactly a call's key."""
    os.environ.setdefault("FLA_CACHE_MODE", "strict")


def folder_of(gpu: str) -> Path:
    """Where the configurations of a GPU are, if there are any; `gpu` as CUDA names it: "NVIDIA H100 80GB HBM3"."""
    return FOLDER / re.sub(r"[^0-9A-Za-z]+", "_", _SAME_CHIP.get(gpu, gpu)).strip("_")


def use_tuned_kernels(gpu: str, fla_version: str) -> None:
    """Name the folder of this GPU, unless there is none or the user has named another."""
    folder = folder_of(gpu)
    if fla_version == TUNED_WITH and folder.is_dir():
        os.environ.setdefault("FLA_CONFIG_DIR", str(folder))
