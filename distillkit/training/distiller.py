"""The module that is trained: student, projections and losses in one forward.

Where all losses compare attention outputs, the student's layers, norms and head do not run at all: only its attention.

Trainer and DDP wrap this module. The whole of the student's computation, the head's included, happens inside of
its forward, which is where their hooks expect it; the teacher's does not.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from distillkit.losses.alignment import AlignedLayer
from distillkit.losses.objective import Objective
from distillkit.models.attention import AttentionRecord, attention_calls, trained_attention
from distillkit.models.decoder import decode, head
from distillkit.teacher import TeacherSignal


class DistillerOutput(TypedDict):
    """A micro-batch's part of a step's loss, and each loss's sum and count for the record."""

    loss: Float[Tensor, ""]
    sums: dict[str, Tensor]
    counts: dict[str, Tensor]


class Distiller(nn.Module):
    """A student with its objective.

    The loss of a micro-batch is its share of the whole optimizer step's: sums over its own tokens, divided by the
    number of counted tokens of all micro-batches of all ranks. Adding up the micro-batches gives the step's loss,
    however the step is cut.
    """

    accepts_loss_kwargs = True
    """Tells Trainer not to divide by the number of micro-batches."""

    def __init__(self, student: PreTrainedModel, objective: Objective) -> None:
        super().__init__()
        self.student = student
        self.objective = objective

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        position_ids: Int[Tensor, "batch tokens"],
        targets: Int[Tensor, "batch tokens"],
        normalizer: Tensor,
        preference_pairs: dict[str, Tensor] | None = None,
        signal: TeacherSignal | None = None,
    ) -> DistillerOutput:
        """The losses of a batch.

        Args:
            input_ids, position_ids, targets: as `distillkit.data` collates them.
            normalizer: counted tokens of the whole optimizer step.
            preference_pairs: preference pairs of the whole optimizer step, per ranking loss.
            signal: the teacher's outputs for this batch; None where no loss needs them.
        """
        final: Tensor | None = None
        states: dict[int, Tensor] = {}
        if self.objective.needs_hidden_states:
            final, states = decode(
                self.student,
                input_ids,
                position_ids,
                self.objective.student_layers,
                final_norm=self.objective.taps_final_norm,
            )
        weight, bias = head(self.student)
        result = self.objective(
            final,
            weight,
            bias,
            targets,
            None if signal is None else signal.distribution,
            states,
            {} if signal is None else signal.hidden_states,
            normalizer,
            preference_pairs,
            [] if signal is None else self._aligned_layers(input_ids, position_ids, signal.attention),
        )
        return {"loss": result.loss, "sums": result.sums, "counts": result.counts}

    def within(self, work: Callable[[], Any]) -> Any:
        """What `work` returns. It may use the student as a forward of this module does, also where it is divided."""
        return work()

    def _aligned_layers(
        self, input_ids: Tensor, position_ids: Tensor, records: Mapping[int, AttentionRecord]
    ) -> list[AlignedLayer]:
        """The student's attention of the objective's layers, on the teacher's inputs."""
        layers = self.objective.attention_layers
        if not layers:
            return []
        inputs = {index: records[index].input for index in layers}
        calls = attention_calls(self.student, input_ids, position_ids, inputs)
        trained = trained_attention(self.student)
        return [AlignedLayer(calls[index], trained[index], records[index].output) for index in layers]
