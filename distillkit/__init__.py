"""distillkit: knowledge distillation, from a softmax-attention teacher to a Kimi Delta Attention student.

Importing the package registers the student's classes with transformers, so that `AutoModelForCausalLM` loads a
student whichever is imported first. `convert`, `distill` and `evaluate` are the commands of the same names.
"""

import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distillkit.conversion import convert as convert
    from distillkit.evaluation import evaluate as evaluate
    from distillkit.training import distill as distill


def _started_as_command() -> bool:
    """Whether this process is `distillkit ...` or `python -m distillkit ...`."""
    if sys.argv[0] == "-m":  # the module to run is not in sys.argv while its package is imported
        modules = [module for flag, module in pairwise(sys.orig_argv) if flag == "-m"]
        return modules[:1] == ["distillkit"]
    return Path(sys.argv[0]).stem == "distillkit"


# The classes need torch, which takes seconds to import. The command line answers `--help` and mistakes in a
# configuration without it, and registers the classes when it comes to load a model.
if not _started_as_command():
    from distillkit import model as model


def __getattr__(name: str) -> Any:
    if name == "convert":
        from distillkit.conversion import convert

        return convert
    if name == "distill":
        from distillkit.training import distill

        return distill
    if name == "evaluate":
        from distillkit.evaluation import evaluate

        return evaluate
    raise AttributeError(f"module 'distillkit' has no attribute {name!r}")
