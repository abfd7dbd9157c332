"""A teacher that is a live model, run beside the student."""

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from distillkit.distribution import DenseDistribution, Distribution, SparseDistribution
from distillkit.losses.vocabulary_head import padded
from distillkit.models.attention import AttentionRecord, recorded_attention
from distillkit.models.decoder import decode, head
from distillkit.teacher.signal import TeacherSignal


class LiveTeacher:
    """Asks a model for its hidden states at once, and for its logits only a chunk of tokens at a time.

    Args:
        model: the teacher; it is put in evaluation mode and never trained.
        layers: indices of the hidden states to give with each signal.
        final_norm: whether the last index is the state after the final norm, or the last layer's output.
        top_k: give only the k likeliest tokens, their log-probabilities normalised over the whole vocabulary.
        vocabulary_size: columns that belong to the tokenizer; a wider head's others are as if they were not there.
        background: log-distribution over the head's columns that mass outside the top k may be taken to follow.
        attention_layers: layers, counted from 0, whose attention's inputs and outputs to give with each signal.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Iterable[int] = (),
        *,
        final_norm: bool = True,
        top_k: int | None = None,
        vocabulary_size: int | None = None,
        background: Float[Tensor, " vocab"] | None = None,
        attention_layers: Iterable[int] = (),
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.layers = tuple(layers)
        self.final_norm = final_norm
        self.top_k = top_k
        self.vocabulary_size = vocabulary_size
        self.background = background
        self.attention_layers = tuple(attention_layers)
        self._matrix = padded(head(model)[0], dim=0)

    @torch.no_grad()
    def signal(self, batch: Mapping[str, Tensor]) -> TeacherSignal:
        """The teacher's word on the batch's `input_ids` and `position_ids`, on the device of the batch.

        It is computed in the teacher's own dtype, whatever autocast says, and on the teacher's own devices.
        """
        device, first = batch["input_ids"].device, self.model.get_input_embeddings().weight.device
        input_ids, position_ids = (batch[name].to(first) for name in ("input_ids", "position_ids"))
        recording = recorded_attention(self.model, self.attention_layers)
        with torch.autocast(first.type, enabled=False), recording as records:
            final, states = decode(self.model, input_ids, position_ids, self.layers, final_norm=self.final_norm)
        weight, bias = head(self.model)
        flat = final.flatten(0, 1).to(weight.device)
        columns = self.vocabulary_size or weight.shape[0]

        @torch.no_grad()
        def logits(hidden: Tensor) -> Distribution:
            with torch.autocast(hidden.device.type, enabled=False):
                whole = F.linear(hidden, self._matrix)[:, : weight.shape[0]]
            dense = DenseDistribution((whole if bias is None else whole + bias)[:, :columns])
            if self.top_k is None:
                return DenseDistribution(dense.logits.to(device))
            best = dense.top_k(self.top_k)
            background = None if self.background is None else self.background.to(device)[:columns]
            return SparseDistribution(best.ids.to(device), best.logprobs.to(device), background)

        def distribution(rows: Tensor) -> Callable[[slice], Distribution]:
            wanted = flat[rows.to(flat.device)]
            return lambda chunk: logits(wanted[chunk])

        def as_batch(state: Tensor) -> Tensor:
            return state.view(*batch["input_ids"].shape, -1).to(device)

        return TeacherSignal(
            distribution,
            {index: state.to(device) for index, state in states.items()},
            {
                index: AttentionRecord(as_batch(record.input), as_batch(record.output))
                for index, record in records.items()
            },
        )
