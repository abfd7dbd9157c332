"""Linear layers that are frozen, with products in float8 (e4m3).

Numbers of a row share a scale: a row of the weight (an output), which is fixed, and a row of the input (a token), whose
scale is made as it comes, so that torch.compile fuses it with what made the row. Products are accumulated in float32
and come out in bfloat16.

The gradient of the input is a product over outputs. Their scales are multiplied into the gradient before that gets
scales for its own rows, which is exact: the one byte per weight that the forward pass reads serves both, and is
transposed for the backward pass as it comes, the only order in which Hopper multiplies float8. (A second copy would
double the memory to save some 3 bytes of traffic per weight, 1 to 2 % of a step with 8,192 tokens.) The gradient is
e4m3, too: e5m2 has a wider range and a bit less of precision, and with a scale per row the range of e4m3 suffices, of
2 to the power of 18 below the largest number of the row.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distillkit.config.errors import UserError

FLOAT8 = torch.float8_e4m3fn
MULTIPLE = 16
"""Of inputs and of outputs, for a layer to have products in float8."""

_CAPABILITY = (8, 9)
_LARGEST = torch.finfo(FLOAT8).max
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def check_float8(device: torch.device, key: str, remedy: str) -> None:
    """Raises `UserError` for a device that does not multiply float8. A CPU does, slowly, with a recent PyTorch."""
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < _CAPABILITY:
        raise no_float8(key, f"{torch.cuda.get_device_name(device)} (compute capability {found[0]}.{found[1]})", remedy)
    if device.type == "cpu":
        rows, scale = quantize_rows(torch.ones(MULTIPLE, MULTIPLE))
        try:
            _product(torch.ones(MULTIPLE, MULTIPLE), rows.t(), scale.t())
        except RuntimeError:
            problem = f"PyTorch {torch.__version__} has no float8 products of rows on a CPU"
            raise UserError(key, f"{problem}; use a newer one, or {remedy}") from None


def no_float8(key: str, gpu: str, remedy: str) -> UserError:
    """The error for a GPU that does not multiply float8."""
    needed = "float8 needs a GPU of compute capability 8.9 or higher (Ada, Hopper, Blackwell)"
    return UserError(key, f"{needed}, which {gpu} is not; {remedy}")


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`[..., row]` as float8 and float32 scales `[..., 1]`; their product is about `x`. Infinities become NaN."""
    scale = (x.abs().amax(-1, keepdim=True).float() / _LARGEST).clamp(min=_SMALLEST_SCALE)
    return (x / scale).to(FLOAT8), scale


def _product(x: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    """`[..., inputs]` @ `[inputs, outputs]` in bfloat16; of the latter the inputs lie beside each other in memory.

    scale: `[1, outputs]`.
    """
    rows, row_scale = quantize_rows(x.flatten(0, -2).contiguous())
    product = torch._scaled_mm(
        rows, columns, scale_a=row_scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return product.unflatten(0, x.shape[:-1])


class _Float8Product(torch.autograd.Function):
    """`x @ (weight * scale).T`, with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.dtype = x.dtype
        return _product(x, weight.t(), scale.t())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        columns, ones = weight.t().contiguous().t(), scale.new_ones(1, weight.shape[1])
        return _product(gradient * scale.t(), columns, ones).to(ctx.dtype), None, None


class Float8Linear(nn.Module):
    """Stands for a linear layer that is not trained, and computes on the device of its weight.

    Its numbers are no parameters or buffers: nothing casts, moves or communicates them.

    Args:
        linear: what it stands for.
        keep: keep that, on the CPU, so that it can come back; until then the state of the model is that with it.
    """

    def __init__(self, linear: nn.Linear, keep: bool) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.device, self.dtype = weight.device, weight.dtype
        self.numbers, self.scale = quantize_rows(weight)
        self.bias = None if linear.bias is None else linear.bias.detach()
        for each in (self.numbers, self.scale):  # as weights: compiled steps keep these and nothing made of them
            torch._dynamo.mark_static_address(each, guard=False)
        self._kept: tuple[nn.Linear, ...] = (linear.to("cpu"),) if keep else ()  # a tuple hides it from the model

    @torch.no_grad()
    def original(self) -> nn.Linear:
        """The layer that this one stands for, back on its device."""
        return self._kept[0].to(self.device)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Float8Product.apply(x, self.numbers, self.scale)
        product = product.to(self.dtype)
        return product if self.bias is None else product + self.bias

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for linear in self._kept:
            linear._save_to_state_dict(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def float8_layers(model: PreTrainedModel, key: str) -> dict[str, nn.Linear]:
    """The linear layers that can be exchanged, by name: frozen ones, whose weights no other module has; not the head.

    Inputs and outputs are multiples of `MULTIPLE`. What the architecture keeps in float32 stays. key: of the YAML.

    Raises `UserError` where there is none.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    users = Counter(id(each) for module in modules.values() for each in module._parameters.values() if each is not None)
    head, kept = model.get_output_embeddings(), {*(model._keep_in_fp32_modules_strict or ())}
    layers = {
        name: module
        for name, module in modules.items()
        if type(module) is nn.Linear
        and module is not head
        and not any(each.requires_grad or users[id(each)] > 1 for each in module.parameters())
        and module.in_features % MULTIPLE == module.out_features % MULTIPLE == 0
        and not kept & {*name.split(".")}
    }
    if not layers:
        problem = f"there is no frozen linear layer but the head with multiples of {MULTIPLE} inputs and outputs"
        raise UserError(key, f"{problem}; remove it")
    return layers


@torch.no_grad()
def exchange(
    model: PreTrainedModel, key: str, *, device: torch.device | None = None, keep: bool = False
) -> dict[str, Float8Linear]:
    """Exchange a model's frozen linear layers, one after another; those that came, by name.

    key: of the YAML, for the error. device: where they will compute; None for where they are. keep: see `Float8Linear`.

    Raises `UserError` where there is none, or one is not in memory.
    """
    layers, made = float8_layers(model, key), {}
    for name in list(layers):
        linear = layers.pop(name)  # the last that holds it: one layer at a time is in memory twice
        if linear.weight.is_meta:
            raise UserError(key, f"{name} is not in memory (device_map); float8 needs all layers on GPUs")
        made[name] = Float8Linear(linear if device is None else linear.to(device), keep)
        model.set_submodule(name, made[name])
    return made


@contextmanager
def frozen_in_float8(model: PreTrainedModel, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Within, frozen linear layers of a student compute in float8; after it all is as it was, bit for bit.

    Meanwhile the layers themselves are on the CPU, and in the model's state.

    say: is given a line about it.
    """
    made = exchange(model, "frozen_precision", keep=True)
    numbers = sum(layer.numbers.numel() for layer in made.values())
    say(f"float8: {len(made)} frozen linear layers compute in it ({numbers:,} weights); all others as before")
    try:
        yield
    finally:
        for name, layer in made.items():
            model.set_submodule(name, layer.original())
