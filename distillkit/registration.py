"""Registers the student's classes with transformers once its auto classes are imported, and not before.

Registering imports torch, which takes seconds that `--help` and a mistyped key should not cost. So an import hook waits
for those modules of transformers that the student's classes are made from. They import one another: the classes are
registered when none of them is half-way through its own import.
"""

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

_NETWORK = "distillkit.student.network"
"""Importing it registers the classes."""

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"
_NEEDED = {
    _AUTO_CONFIG,
    "transformers.models.auto.modeling_auto",
    "transformers.modeling_utils",
    "transformers.generation.utils",
}


class _Hook(MetaPathFinder):
    """Tries to register after each import of a needed module."""

    def __init__(self) -> None:
        self._running: set[str] = set()

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name not in _NEEDED or name in self._running:
            return None
        self._running.add(name)  # so that the search below passes this hook by
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            self._running.discard(name)
            return spec
        execute = spec.loader.exec_module

        def execute_then_register(module: Any) -> None:
            try:
                execute(module)
            finally:
                self._running.discard(name)
            if not self._running and _AUTO_CONFIG in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                importlib.import_module(_NETWORK)

        spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec


def register_students() -> None:
    """Now, where the auto classes are imported already, else as soon as they are."""
    if _AUTO_CONFIG in sys.modules:
        importlib.import_module(_NETWORK)
    else:
        sys.meta_path.insert(0, _Hook())
