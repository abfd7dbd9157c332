"""What a run leaves on the disk."""

from dataclasses import dataclass

from torch import nn

from distillkit.planning.settings import Settings
from distillkit.training.optimizer_memory import optimizer_memory


@dataclass(frozen=True)
class DiskUse:
    """Bytes. checkpoint: one, with what trains as it is stored and the optimizer's states. checkpoints: all that are
    left; while another is written there is one more. student: what the run saves at its end."""

    checkpoint: int
    checkpoints: int
    student: int

    @property
    def total(self) -> int:
        return self.checkpoints + self.student


def disk_use(
    student: nn.Module, settings: Settings, reached: list[nn.Parameter], *, masters: bool, adapter_alone: bool
) -> DiskUse:
    """Of one run or phase; the student frozen and cast as it trains.

    reached: parameters that have optimizer states. masters: whether the saved student keeps float32 masters, as that
    of a phase does for the next. adapter_alone: all that a checkpoint holds of the student is what trains.
    """
    parameters = list(student.parameters())
    stored = sum(parameter.nbytes for parameter in parameters)
    held = sum(each.nbytes for each in parameters if each.requires_grad) if adapter_alone else stored
    numbers = sum(parameter.numel() for parameter in parameters)
    checkpoint = held + optimizer_memory(settings.optim, reached, cuda=True).states
    kept = settings.save_total_limit if settings.saves else 0
    return DiskUse(checkpoint, kept * checkpoint, stored if masters else numbers * settings.compute_dtype.itemsize)
