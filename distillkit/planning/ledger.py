"""An account of the memory and the work of tensors that have shapes and no data.

Within a `Ledger` PyTorch runs as ever, autograd included, and computes nothing: tensors are fake ones
(`torch._subclasses.FakeTensorMode`), which know their sizes. The ledger sees every tensor come and go, so that it can
say how many bytes were alive at the worst moment and of what kind, and it adds up the floating point operations.
It also notes what processes would send each other that are not there.

Small whole numbers are real: positions, labels and boundaries of documents decide how much there is to do.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.fsdp
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.fake_collectives import CollectiveOp
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

GATHERED = "gathered weights"
"""Kind of what is whole for a moment of models that are divided: weights, and gradients on their way."""

ALL_GATHER, ALL_REDUCE, ALL_TO_ALL = "all-gather", "all-reduce", "all-to-all"
_COLLECTIVES = {
    torch.ops.c10d._allgather_base_.default: ALL_GATHER,
    torch.ops.c10d._reduce_scatter_base_.default: "reduce-scatter",
    torch.ops.c10d.allreduce_.default: ALL_REDUCE,
    torch.ops.c10d.alltoall_base_.default: ALL_TO_ALL,
}
_COPY_OUT = torch.ops.fsdp.split_with_sizes_copy.default
_RESIZE = torch.UntypedStorage.resize_


@dataclass(frozen=True)
class Collective:
    """kind: of `_COLLECTIVES`. size: bytes of the whole tensor. ranks: of those that take part. alone: nothing is
    computed before its result is needed, or after it began, in its moment."""

    kind: str
    size: int
    ranks: Sequence[int]
    alone: bool


class Ledger(TorchDispatchMode):
    """Enter it, and make and use tensors.

    live: bytes alive now, by kind. peak: the same at the moment when most were alive, and `peak_moment` what was done
    then. flops: floating point operations (a multiplication with its addition is two), by moment. attention_flops,
    float8_flops: those of them that are softmax attention, and products in float8.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.attention_flops = self.float8_flops = 0
        self.peak_moment = ""
        self.moment = ""
        self.kind = "activations"
        self._collectives: list[tuple[str, int, list[int], str, int]] = []
        self._gathers: dict[int, tuple[str, int, list[int]]] = {}
        self._known: dict[int, tuple[int, str]] = {}
        self._total = self._highest = 0
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> "Ledger":
        def resize(storage: torch.UntypedStorage, size: int) -> None:  # no operation, so that no mode sees it
            _RESIZE(storage, size)
            self._resized(storage._cdata, size)

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        self._fake.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = _RESIZE  # type: ignore[method-assign]
        super().__exit__(*error)
        self._fake.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # autograd asks it more often than all else together
            return args[0].fake_device
        kwargs = kwargs or {}
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it does the same with its local tensors
        if _is_real(args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        out = func(*args, **kwargs)
        flops = _flops(func, args, kwargs, out)
        self.flops[self.moment] += flops
        if func._overloadpacket in (_ATTENTION, _ATTENTION_BACKWARD):
            self.attention_flops += flops
        elif func._overloadpacket is torch.ops.aten._scaled_mm:
            self.float8_flops += flops
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor):
                self._see(tensor)
        if func.namespace == "fsdp":
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, FakeTensor):
                    self._book(tensor, GATHERED, of="activations")
        if func in _COLLECTIVES or func is _COPY_OUT:
            self._note(func, args, kwargs, out)
        return out

    @property
    def collectives(self) -> list[Collective]:
        """What the processes sent each other, in its order."""
        return [
            Collective(kind, size, ranks, kind == ALL_TO_ALL or done in (0, self.flops[moment]))
            for kind, size, ranks, moment, done in self._collectives
        ]

    @contextmanager
    def during(self, moment: str) -> Iterator[None]:
        """What happens within is booked under this name."""
        before, self.moment = self.moment, moment
        try:
            yield
        finally:
            self.moment = before

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Tensors that are made within are of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def book_gradient(self, parameter: Tensor) -> None:
        """A parameter's gradient, which exists already, is of the kind `gradients` from now on."""
        gradient = parameter.grad
        assert gradient is not None
        self._book(gradient.to_local() if isinstance(gradient, DTensor) else gradient, "gradients")

    def _book(self, tensor: Tensor, kind: str, of: str | None = None) -> None:
        """A tensor is of this kind from now on, if it was of the kind `of`, or of any."""
        key = tensor.untyped_storage()._cdata
        size, before = self._known[key]
        if of in (None, before):
            self._known[key] = (size, kind)
            self.live[before] -= size
            self.live[kind] += size

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """A collective; one that gathers when its result is copied, which waits for it."""
        if func is _COPY_OUT:
            found = self._gathers.pop(args[0].untyped_storage()._cdata)
        else:
            ranks = torch.distributed.get_process_group_ranks(CollectiveOp.get_process_group(func, args))
            found = (_COLLECTIVES[func], CollectiveOp.get_comm_tensor_size(func, out, args, kwargs), ranks)
            if found[0] == ALL_GATHER:
                self._gathers[args[0].untyped_storage()._cdata] = found
                return
        self._collectives.append((*found, self.moment, self.flops[self.moment]))

    def _resized(self, key: int, size: int) -> None:
        if key in self._known:
            before, kind = self._known[key]
            self._known[key] = (size, kind)
            self._add(kind, size - before)

    def fresh_peak(self) -> None:
        """Forget the peak until now."""
        self._highest, self.peak, self.peak_moment = self._total, self.live.copy(), self.moment

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = (size, self.kind)
        weakref.finalize(storage, self._gone, key).atexit = False
        self._add(self.kind, size)

    def _add(self, kind: str, size: int) -> None:
        self.live[kind] += size
        self._total += size
        if self._total > self._highest:
            self.fresh_peak()

    def _gone(self, key: int) -> None:
        size, kind = self._known.pop(key)
        self._add(kind, -size)


def _is_real(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation is on real tensors alone, or makes whole numbers of nothing."""
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    if tensors:
        return not any(isinstance(each, FakeTensor) for each in tensors)
    dtype = kwargs.get("dtype")
    device = kwargs.get("device")
    made_of_ints = dtype is None and all(type(each) is int for each in args)
    whole = made_of_ints or (dtype is not None and not dtype.is_floating_point)
    return whole and (device is None or torch.device(device).type == "cpu")


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    packet = func._overloadpacket
    if packet is _ATTENTION:
        return _attention_flops(args[0], args[1], products=2)
    if packet is _ATTENTION_BACKWARD:
        return _attention_flops(args[1], args[2], products=5)
    count: Callable[..., int] | None = flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


def _attention_flops(query: Tensor, key: Tensor, products: int) -> int:
    """Causal attention: every product is over half of the pairs of tokens. The backward pass has five, not two."""
    batch, heads, tokens, head_dim = query.shape
    return products * batch * heads * tokens * key.shape[2] * head_dim


def without_data(module: nn.Module, ledger: Ledger, kind: str) -> None:
    """Give a module on the meta device parameters and buffers of the same shapes and dtypes that the ledger knows."""
    made: dict[int, nn.Parameter] = {}
    with ledger.making(kind):
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                part._parameters[name] = made[id(parameter)]
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
