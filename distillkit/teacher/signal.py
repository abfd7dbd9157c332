"""What a teacher gives for a batch, wherever it comes from.

A teacher has three things to say: at each counted position a distribution over the next token, which is asked for a
chunk of positions at a time so that [tokens, vocab] never exists; hidden states of some of its layers; and what the
attention of some of its layers was given and returned.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from jaxtyping import Float, Int
from torch import Tensor

from distillkit.distribution import Distribution
from distillkit.models.attention import AttentionRecord

DistributionOfRows = Callable[[Int[Tensor, " rows"]], Callable[[slice], Distribution]]
"""From indices into the flattened batch [batch · tokens] to the distributions of a slice of these rows."""


@dataclass(frozen=True)
class TeacherSignal:
    """A teacher's word on one batch [batch, tokens]."""

    distribution: DistributionOfRows
    hidden_states: dict[int, Float[Tensor, "batch tokens width"]] = field(default_factory=dict)
    """By index as in transformers' `output_hidden_states`: 0 is the embeddings."""
    attention: dict[int, AttentionRecord] = field(default_factory=dict)
    """By layer, counted from 0."""


class Teacher(Protocol):
    """Whoever can be asked about a batch, as `distillkit.data` collates it."""

    def signal(self, batch: Mapping[str, Tensor]) -> TeacherSignal: ...
