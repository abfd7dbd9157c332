"""What modules are given and return while a model runs, and what else they may be made to do."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Call:
    """One call of a module: its arguments and what it returned."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    returned: Any

    @property
    def input(self) -> Tensor:
        """The first argument, which decoder layers and attention call `hidden_states`."""
        given: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return given

    @property
    def output(self) -> Tensor:
        """What was returned, or the first part of it: attention returns its weights, too."""
        first: Tensor = self.returned[0] if isinstance(self.returned, tuple) else self.returned
        return first


@contextmanager
def recorded(modules: Mapping[Key, nn.Module], keep: Callable[[Call], Value]) -> Iterator[dict[Key, Value]]:
    """Within, each call of one of the modules puts here, under the module's key, what `keep` takes of it."""
    records: dict[Key, Value] = {}

    def record(key: Key, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
        records[key] = keep(Call(args, kwargs, returned))

    with ExitStack() as hooks:
        for key, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(record, key), with_kwargs=True))
        yield records


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, a module calls another forward; then that of its class again, or its own, such as accelerate's."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
