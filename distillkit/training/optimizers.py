"""Optimizers that lose no small update, over those that Trainer makes by name.

Weights in float32 are any optimizer's business. Weights in bf16 (`trained_weights: bfloat16`) move only where they are
rounded stochastically: up or down with the probability that makes the rounded weight right on average, so that a
thousand updates of a thousandth of a bf16 step are one step. `StochasticAdamW` does that here, torchao's 8-bit and
4-bit AdamW do it there; no other optimizer is given a bf16 weight.

The random numbers of a step follow from the number of the step alone. So all ranks of a data-parallel run round alike
and stay one model, and a resumed run rounds as the run that was not disturbed. `StochasticAdamW` draws those of whole
parameters also where a process has a part of each, and takes its own: however a parameter is divided, an element is
rounded by the same number.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from jaxtyping import BFloat16, Float, Int
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from distillkit.config import UserError
from distillkit.config.training_args import QUANTIZED_OPTIMIZERS, STOCHASTIC_OPTIMIZERS
from distillkit.console import print_line

SLICE = 2**24
"""Weights that `StochasticAdamW` updates at a time: what it computes in float32 for them is all it needs besides."""

LOSSY_ADDENDS = 24
"""So many equal bf16 numbers, added up in bf16, miss their sum by 1.1 % (16: 0.8 %, 32: 1.6 %, 64: 3.2 %)."""


def protect_updates(
    optim: str, optimizer_class: Any, options: dict[str, Any], trained: list[nn.Parameter]
) -> tuple[Any, dict[str, Any]]:
    """The optimizer class and options for `trained` that do what Trainer's do, and lose no small update.

    Args:
        optim: `training_args.optim`.
        optimizer_class, options: what Trainer would make of it.

    Raises:
        UserError: there are bf16 weights, and the optimizer cannot round stochastically.
    """
    in_bf16 = any(parameter.dtype == torch.bfloat16 for parameter in trained)
    if in_bf16 and optim not in STOCHASTIC_OPTIMIZERS:
        raise UserError(
            "training_args.optim",
            f"{optim} loses small updates of bfloat16 weights; use "
            f"{', '.join(STOCHASTIC_OPTIMIZERS[:-1])} or {STOCHASTIC_OPTIMIZERS[-1]}",
        )
    if optim in QUANTIZED_OPTIMIZERS:
        return _step_seeded(optimizer_class), {**options, "bf16_stochastic_round": in_bf16}
    if in_bf16:
        return StochasticAdamW, {name: value for name, value in options.items() if name != "fused"}
    if optim == "adamw_torch" and all(parameter.is_cuda for parameter in trained):
        return optimizer_class, {**options, "fused": True}
    return optimizer_class, options


class StochasticAdamW(Optimizer):
    """AdamW (Loshchilov & Hutter, 2019) for bf16 weights; half the memory of AdamW with float32 masters.

    Computed in float32; weights and both moments are stored in the weights' dtype. Where that is bf16 all three are
    rounded stochastically: at beta2 = 0.999 the second moment, too, changes by less than its bf16 neighbours differ.
    Weights in float32 are updated exactly as by `torch.optim.AdamW`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        seed, generators = _next_step(self), dict[torch.device, torch.Generator]()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                device = parameter.device
                if device not in generators:
                    generators[device] = torch.Generator(device).manual_seed(seed)
                self._update(parameter, group, generators[device])
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], generator: torch.Generator) -> None:
        state = self.state[parameter]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        assert parameter.grad is not None
        tensors = (parameter.detach(), parameter.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"])
        local = [(each.to_local() if isinstance(each, DTensor) else each).view(-1) for each in tensors]
        first = _first_element(parameter)
        for start in range(0, parameter.numel(), SLICE):
            size = min(SLICE, parameter.numel() - start)
            begin, end = (min(max(each - first, 0), local[0].numel()) for each in (start, start + size))
            noise = partial(noise_of, generator, size, slice(first + begin - start, first + end - start))
            weight, gradient, mean, square = (each[begin:end] for each in local)
            _adamw(weight, gradient, mean, square, state["step"], group, noise)


def _first_element(parameter: Tensor) -> int:
    """The place, in the whole parameter, of the first element that this process has of it."""
    if not isinstance(parameter, DTensor):
        return 0
    assert all(placement.is_replicate() or placement.is_shard(0) for placement in parameter.placements)
    _, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offsets[0] * (parameter.numel() // max(1, parameter.shape[0]))


def noise_of(generator: torch.Generator, size: int, part: slice = slice(None)) -> Int[Tensor, " numbers"]:
    """A part of so many random 16-bit numbers, on the generator's device; all are drawn, whatever the part."""
    return torch.randint(2**16, (size,), dtype=torch.int32, device=generator.device, generator=generator)[part]


def _adamw(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: int,
    group: dict[str, Any],
    noise: Callable[[], Tensor],
) -> None:
    """One update, in place, of weights and of the running means of the gradient and its square."""
    beta1, beta2 = group["betas"]
    exact_gradient = gradient.float()
    exact_mean = mean.float().lerp(exact_gradient, 1 - beta1)
    exact_square = square.float().lerp(exact_gradient.square(), 1 - beta2)
    denominator = (exact_square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    exact_weight = weight.float().mul(1 - group["lr"] * group["weight_decay"])
    exact_weight.addcdiv_(exact_mean, denominator, value=-group["lr"] / (1 - beta1**step))
    for stored, exact in ((weight, exact_weight), (mean, exact_mean), (square, exact_square)):
        stored.copy_(round_stochastically(exact, noise()) if stored.dtype == torch.bfloat16 else exact)


def round_stochastically(
    exact: Float[Tensor, " numbers"], noise: Int[Tensor, " numbers"]
) -> BFloat16[Tensor, " numbers"]:
    """bf16 numbers whose expectation is `exact`, which is float32, over `noise`, which is uniform in 16 bits.

    bf16 is the upper half of a float32. A uniform random number, added to the lower half before that is cut off,
    carries into the upper with just the probability that the lower half stands for. What is not finite is kept: the
    bits of a NaN could carry over into those of -0, and a broken step would look like weights of zero.
    """
    bits = exact.view(torch.int32)
    rounded = ((bits + noise) & -(2**16)).view(torch.float32)
    return torch.where(exact.isfinite(), rounded, exact).bfloat16()


def _step_seeded(optimizer_class: type[Optimizer]) -> type[Optimizer]:
    """torchao's optimizer, with random numbers that follow from the step, and compiled on CUDA alone.

    Compiling for the CPU needs a C++ compiler and takes half a minute for each shape of a weight.
    """

    class StepSeeded(optimizer_class):  # type: ignore[misc, valid-type]
        def _subclass_zeros(self, p: Tensor, signed: bool, block_size: int) -> Any:
            """Zeros that call themselves float32: those of bf16 do so once they are in a DTensor, which is not told."""
            return super()._subclass_zeros(torch.empty_like(p, dtype=torch.float32), signed, block_size)

        def step(self, closure: Callable[[], float] | None = None) -> Any:
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            cuda = sorted({parameter.get_device() for parameter in parameters if parameter.is_cuda})
            compilation: AbstractContextManager[Any] = torch.compiler.set_stance("default" if cuda else "force_eager")
            with torch.random.fork_rng(devices=cuda), compilation:
                torch.manual_seed(_next_step(self))
                return super().step(closure)

    StepSeeded.__name__ = optimizer_class.__name__
    return StepSeeded


def _next_step(optimizer: Optimizer) -> int:
    """The number of the step that begins; it is saved and loaded with the optimizer."""
    group = optimizer.param_groups[0]
    group["steps"] = group.get("steps", 0) + 1
    return int(group["steps"])


def describe(optimizer: Optimizer) -> str:
    """A line that names the optimizer, and what keeps small updates from being lost."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    words = [type(optimizer).__name__]
    if any(group.get("fused") for group in optimizer.param_groups):
        words.append("fused")
    if any(parameter.dtype == torch.bfloat16 for parameter in parameters):
        words.append("bfloat16 weights rounded stochastically")
    elif {parameter.dtype for parameter in parameters} == {torch.float32}:
        words.append("float32 weights")
    return f"optimizer: {', '.join(words)}"


def lossy_accumulation(optimizer: Optimizer, micro_batches: int) -> str | None:
    """The line that warns of gradients that are added up in bf16, where so many lose more than 1 % of a sum."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if micro_batches < LOSSY_ADDENDS or not any(parameter.dtype == torch.bfloat16 for parameter in parameters):
        return None
    return (
        f"trained_weights: the gradients of {micro_batches} micro-batches are added up in bfloat16, which rounds away "
        "more than 1 % of them; use a larger training_args.per_device_train_batch_size with fewer "
        "gradient_accumulation_steps, or trained_weights: float32"
    )


class OptimizerLine(TrainerCallback):
    """Says at the beginning of training which optimizer it is."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Optimizer, **_: Any
    ) -> None:
        optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        for line in (describe(optimizer), lossy_accumulation(optimizer, args.gradient_accumulation_steps)):
            if line is not None:
                print_line(self._console, line)
