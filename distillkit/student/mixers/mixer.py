"""The interface of a mixer: how it is initialised from a teacher, and what a plan needs to know of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distillkit.config import InitializationConfig

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Start:
    """What a layer's new parameters are made from.

    options: `student.initialization`.
    std: of the teacher's own initialisation (`initializer_range`).
    generator: on the CPU, so that a seed means the same on every device.
    attention_distances: tokens that each head of the teacher's attention looks back on average, where the mixer asked.
    """

    options: InitializationConfig
    std: float
    generator: torch.Generator
    attention_distances: Float[Tensor, " heads"] | None = None


class Mixer(ABC):
    """A mixer as conversion, planning and the conversion's summary see it; modules of layers are typed `Any`.

    Only what must differ needs to be said: the defaults are those of a mixer that is plain PyTorch, takes any attention
    and is done once it is initialised.
    """

    keeps_teacher_weights = False
    """The layer is the teacher's own attention: it shares the tensors and is not initialised."""

    def check(self, attention: Any) -> str | None:
        """Why the attention of a teacher's layer cannot become this mixer, to follow its name; None if it can.

        A subclass asks this first: every teacher has these projections.
        """
        linear = [name for name, part in attention.named_children() if isinstance(part, nn.Linear)]
        missing = [part for part in PROJECTIONS if part not in linear]
        return f"has no linear {', '.join(missing)}" if missing else None

    def needs_attention_distances(self, options: InitializationConfig) -> bool:
        """Whether `initialize` uses how far the teacher's heads look back."""
        return False

    @abstractmethod
    def initialize(self, layer: Any, attention: Any, start: Start) -> None:
        """Set every parameter of a layer, whose memory has no content yet, from the teacher's attention."""

    def calibrate(  # noqa: B027  most mixers need none
        self,
        layer: Any,
        hidden_states: Float[Tensor, "batch tokens width"],
        attention_output: Float[Tensor, "batch tokens channels"],
    ) -> None:
        """Fit an initialised layer to its teacher's.

        hidden_states: what the teacher's attention was given. attention_output: what its heads made of it, before the
        output projection.
        """

    def divide_rows(self, layer: Any) -> bool:
        """Let a layer work where `models.divided_rows` says that its rows are divided; whether it can."""
        return False

    @abstractmethod
    def state_bytes(self, layer: Any) -> int:
        """Bytes of one sequence's state between two decoding steps, whatever the sequence's length."""

    def cache_channels(self, layer: Any) -> int:
        """Numbers that each token of a sequence leaves in the cache."""
        return 0

    def plan_on_cuda(self, layer: Any, count_flops: Callable[[int], None]) -> None:  # noqa: B027  nor this
        """Let a layer on tensors without data allocate and compute what its CUDA kernels do.

        Nothing need be done for a layer whose operations are PyTorch's; `count_flops` gets those of other kernels.
        """
