"""The plan of a run and of a capture, as data."""

from dataclasses import asdict, dataclass, field
from typing import Any

from distillkit.planning.disk import DiskUse
from distillkit.planning.gpus import CONTEXT, FRAGMENTS, GPU
from distillkit.planning.step import StepCost
from distillkit.planning.tokens import Amount, Schedule


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step that are computed, and that are communicated; alone: of the latter those in which
    nothing is computed. The rest of both is at the same time."""

    computed: float
    communicated: float
    alone: float

    @property
    def total(self) -> float:
        return max(self.computed, self.communicated - self.alone) + self.alone

    @property
    def limit(self) -> str:
        """What takes longer."""
        return "computing" if self.computed >= self.communicated - self.alone else "communication"


@dataclass(frozen=True)
class PhasePlan:
    """One phase, or a whole run without phases (then `name` is empty).

    cost is None where the step could not be simulated; errors say why.
    """

    name: str
    sequence_length: int
    losses: list[str]
    schedule: Schedule
    trainable: int
    """Parameters that are not frozen."""
    trained: int
    """Those of them that a loss gives a gradient."""
    groups: dict[str, tuple[int, int]]
    """(all, trained) parameters of each part of the student."""
    cost: StepCost | None
    micro_batch: int
    """Tokens of a micro-batch on one GPU."""
    micro_batches: int
    """Of a step, on one GPU."""
    step: StepTime | None
    seconds: float | None
    tokens_per_second: float | None
    disk: DiskUse

    @property
    def reserve(self) -> float:
        """Bytes beside what is allocated: CUDA's context, and what the allocator cannot use."""
        if self.cost is None:
            return 0.0
        loose = self.cost.memory.get("activations", 0) + self.cost.memory.get("gradients", 0)
        return CONTEXT + FRAGMENTS * loose

    @property
    def memory(self) -> float | None:
        """Bytes of one GPU, in all."""
        return None if self.cost is None else self.cost.allocated + self.reserve

    @property
    def gflops_per_token(self) -> dict[str, float]:
        """Of each part of a step, in 10^9 operations."""
        if self.cost is None:
            return {}
        return {moment: count / self.micro_batch / 1e9 for moment, count in self.cost.flops.items()}


@dataclass(frozen=True)
class RunPlan:
    """What a run would cost. `as_dict` is the same as JSON.

    errors: lines about what would stop the run. warnings: lines about what is doubtful.
    """

    gpu: GPU
    gpus: int
    """Of all nodes."""
    nodes: int
    shard: int
    replicate: int
    context: int
    teacher: str
    teacher_parameters: int | None
    student_parameters: int
    phases: list[PhasePlan]
    untrained: int
    """Bytes of the untrained student's folder; 0 where nothing is converted."""
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether every phase fits into the memory of a GPU, as far as is known."""
        return all(phase.memory is None or phase.memory <= self.gpu.memory for phase in self.phases)

    @property
    def disk(self) -> int:
        """Bytes of everything that the run leaves."""
        return self.untrained + sum(phase.disk.total for phase in self.phases)

    @property
    def disk_peak(self) -> int:
        """The most bytes at a time: a checkpoint is whole before an older one is deleted."""
        return self.disk + max(phase.disk.checkpoint for phase in self.phases)

    @property
    def seconds(self) -> float | None:
        """Of all phases; None where one is not known."""
        known = [phase.seconds for phase in self.phases if phase.seconds is not None]
        return sum(known) if len(known) == len(self.phases) else None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers: bytes, seconds, tokens, parameters."""
        data = asdict(self)
        for phase, plain in zip(self.phases, data["phases"], strict=True):
            plain |= {"memory": phase.memory, "gflops_per_token": phase.gflops_per_token}
            if phase.step is not None:
                plain["step"] |= {"total": phase.step.total, "limit": phase.step.limit}
            plain["fits"] = None if phase.memory is None else phase.memory <= self.gpu.memory
            plain["schedule"]["passes"] = phase.schedule.passes
            plain["disk"]["total"] = phase.disk.total
        return data | {
            "fits": self.fits,
            "disk": self.disk,
            "disk_peak": self.disk_peak,
            "seconds": self.seconds,
            "estimate": True,
        }


@dataclass(frozen=True)
class CapturePlan:
    """What a capture would cost on one GPU. Bytes, seconds, tokens."""

    gpu: GPU
    teacher: str
    teacher_parameters: int
    available: Amount | None
    """Tokens that are captured; None where the text is on the hub."""
    bytes_per_token: int
    disk: int | None
    memory: float
    gflops_per_token: float
    tokens_per_second: float | None
    seconds: float | None
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"fits": self.memory <= self.gpu.memory, "estimate": True}
