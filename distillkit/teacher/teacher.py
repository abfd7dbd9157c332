"""The interface of every teacher, wherever its outputs come from.

For a batch a teacher returns up to three things, which `SignalRequest` selects: a distribution over the next token at
each position, computed a chunk of positions at a time so that [tokens, vocab] never exists; hidden states of some
layers; and the inputs and outputs of the attention of some layers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from distillkit.distribution import Distribution
from distillkit.models.attention import AttentionRecord

OverProcesses = Callable[[str | None], list[str | None]]

DistributionOfRows = Callable[[Int[Tensor, " rows"]], Callable[[slice], Distribution]]
"""From indices into the flattened batch [batch · tokens] to the distributions of a slice of these rows."""


@dataclass(frozen=True)
class SignalRequest:
    """What a signal holds besides the distribution, and how much of the distribution.

    hidden_states: indices as in transformers' `output_hidden_states`: 0 is the embeddings.
    final_norm: whether the last index is the state after the final norm, or the last layer's output.
    attention: layers, counted from 0, whose attention's inputs and outputs are returned.
    top_k: only the k likeliest tokens, their log-probabilities normalised over the whole vocabulary.
    vocabulary_size: columns that belong to the tokenizer; the other columns of a wider head are dropped.
    """

    hidden_states: tuple[int, ...] = ()
    final_norm: bool = True
    attention: tuple[int, ...] = ()
    top_k: int | None = None
    vocabulary_size: int | None = None


DISTRIBUTION = SignalRequest()
"""The whole distribution and nothing else."""


@dataclass(frozen=True)
class TeacherSignal:
    """A teacher's outputs for one batch [batch, tokens]."""

    distribution: DistributionOfRows
    hidden_states: dict[int, Float[Tensor, "batch tokens width"]] = field(default_factory=dict)
    attention: dict[int, AttentionRecord] = field(default_factory=dict)
    """By layer, counted from 0."""


class Teacher(ABC):
    """A source of signals for batches as `distillkit.data` collates them."""

    columns: tuple[str, ...] = ()
    """Columns of the dataset, besides the tokens, from which a signal is computed."""

    model: PreTrainedModel | None = None
    """The model that runs here; None where its outputs were captured, or a server computes them."""

    steps_ahead: int = 0
    """Optimizer steps of whose batches it wants to hear before they come (`expect`)."""

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A collated batch with what this teacher needs besides."""
        return batch

    @property
    @abstractmethod
    def vocabulary_size(self) -> int:
        """Columns of the teacher's head, which may be more than the tokens of its tokenizer."""

    @abstractmethod
    def signal(self, batch: Mapping[str, Tensor], request: SignalRequest = DISTRIBUTION) -> TeacherSignal:
        """The requested outputs for a batch, on the batch's device."""

    def expect(self, batches: Sequence[Mapping[str, Tensor]]) -> None:  # noqa: B027
        """The batches that come next, in their order, of which a teacher elsewhere can begin to compute signals."""

    def check_outputs(  # noqa: B027
        self, batch: Mapping[str, Tensor], over_processes: OverProcesses = lambda here: [here]
    ) -> None:
        """Raises `UserError` where a live teacher's outputs for the batch are not finite: where that begins.

        over_processes: what each process gives, where all call this at the same time, each with a batch of its own.
        """

    def check_rows(self, rows: Dataset, key: str) -> None:  # noqa: B027
        """Raises UserError, with `key`, where `columns` of the rows cannot be this teacher's outputs."""
