"""A teacher that is a model, run beside the student."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from distillkit.config.errors import UserError
from distillkit.distribution import DenseDistribution, Distribution, SparseDistribution
from distillkit.models.attention import AttentionRecord, recorded_attention
from distillkit.models.chunked_logits import ChunkedHead, chunk_tokens_within
from distillkit.models.decoder import decode, head, overflowed, where_not_finite
from distillkit.teacher.teacher import DISTRIBUTION, OverProcesses, SignalRequest, Teacher, TeacherSignal

_CHECKED_BYTES = 2**28


class LiveTeacher(Teacher):
    """Computes hidden states of a batch at once, and logits a chunk of tokens at a time.

    Args:
        model: the teacher; it is put in evaluation mode and never trained.
        background: log-distribution, over the head's columns, of the probability outside the top k.
    """

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel, background: Float[Tensor, " vocab"] | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.background = background
        weight, bias = head(model)
        self._head = ChunkedHead(weight, bias, weight.dtype)

    @property
    def vocabulary_size(self) -> int:
        return self._head.columns

    @torch.no_grad()
    def signal(self, batch: Mapping[str, Tensor], request: SignalRequest = DISTRIBUTION) -> TeacherSignal:
        """From the batch's `input_ids` and `position_ids`.

        Computed in the teacher's own dtype, without autocast, and on the teacher's own devices.
        """
        device, first = batch["input_ids"].device, self.model.get_input_embeddings().weight.device
        input_ids, position_ids = (batch[name].to(first) for name in ("input_ids", "position_ids"))
        recording = recorded_attention(self.model, request.attention)
        with torch.autocast(first.type, enabled=False), recording as records:
            final, states = decode(
                self.model, input_ids, position_ids, request.hidden_states, final_norm=request.final_norm
            )
        flat = final.flatten(0, 1).to(self._head.matrix.device)

        def distribution(rows: Tensor) -> Callable[[slice], Distribution]:
            wanted = flat[rows.to(flat.device)]
            return lambda chunk: self._distribution(wanted[chunk], request, device)

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

    def check_outputs(self, batch: Mapping[str, Tensor], over_processes: OverProcesses = lambda here: [here]) -> None:
        """See `Teacher`; the outputs are computed again."""
        rows = torch.arange(batch["input_ids"].numel(), device=batch["input_ids"].device)
        distribution, step = (
            self.signal(batch).distribution(rows),
            chunk_tokens_within(_CHECKED_BYTES, len(self._head.matrix)),
        )
        chunks = (distribution(slice(start, start + step)) for start in range(0, len(rows), step))
        bad = any(isinstance(chunk, DenseDistribution) and overflowed(chunk.logits) for chunk in chunks)
        if not any(over_processes("bad" if bad else None)):
            return
        device = self.model.get_input_embeddings().weight.device
        place = where_not_finite(self.model, *(batch[name].to(device) for name in ("input_ids", "position_ids")))
        raise UserError("teacher.path", next(each for each in over_processes(place if bad else None) if each))

    @torch.no_grad()
    def _distribution(
        self, hidden: Float[Tensor, "tokens width"], request: SignalRequest, device: torch.device
    ) -> Distribution:
        with torch.autocast(hidden.device.type, enabled=False):
            dense = DenseDistribution(self._head.logits(hidden)[:, : request.vocabulary_size])
        if request.top_k is None:
            return DenseDistribution(dense.logits.to(device))
        best = dense.top_k(request.top_k)
        background = None if self.background is None else self.background.to(device)[: request.vocabulary_size]
        return SparseDistribution(best.ids.to(device), best.logprobs.to(device), background)
