"""distillkit: knowledge distillation, from a softmax-attention teacher to a Kimi Delta Attention student.

`convert`, `distill` and `evaluate` are the commands of the same names. After `import distillkit`, transformers'
`AutoModelForCausalLM` loads students.
"""

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distillkit.conversion import convert as convert
    from distillkit.evaluation import evaluate as evaluate
    from distillkit.training import distill as distill

_NETWORK = "distillkit.student.network"
"""Importing it registers the student's classes with transformers."""

_AUTO_CLASSES = "transformers.models.auto.configuration_auto"

_COMMANDS = {"convert": "conversion", "distill": "training", "evaluate": "evaluation"}


class _RegisterStudents(MetaPathFinder):
    """Registers the student's classes as soon as transformers' auto classes are imported.

    Doing so at once would import torch, which takes seconds that `--help` and a mistyped key should not cost.
    """

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _AUTO_CLASSES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            importlib.import_module(_NETWORK)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _AUTO_CLASSES in sys.modules:
    importlib.import_module(_NETWORK)
else:
    sys.meta_path.insert(0, _RegisterStudents())


def __getattr__(name: str) -> Any:
    if name in _COMMANDS:
        return getattr(importlib.import_module(f"distillkit.{_COMMANDS[name]}"), name)
    raise AttributeError(f"module 'distillkit' has no attribute {name!r}")
