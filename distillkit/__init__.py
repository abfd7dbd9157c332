"""distillkit: knowledge distillation of language models, and conversion to students with linear attention.

`convert`, `distill` and `evaluate` are the commands of the same names. After `import distillkit`, transformers'
`AutoModelForCausalLM` loads students.
"""

import importlib
from typing import TYPE_CHECKING, Any

from distillkit.registration import register_students

if TYPE_CHECKING:
    from distillkit.conversion import convert as convert
    from distillkit.evaluation import evaluate as evaluate
    from distillkit.training import distill as distill

_COMMANDS = {"convert": "conversion", "distill": "training", "evaluate": "evaluation"}

register_students()


def __getattr__(name: str) -> Any:
    if name in _COMMANDS:
        return getattr(importlib.import_module(f"distillkit.{_COMMANDS[name]}"), name)
    raise AttributeError(f"module 'distillkit' has no attribute {name!r}")
