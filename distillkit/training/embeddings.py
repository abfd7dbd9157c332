"""Embeddings that grow to a multiple of some number, which matrix products like, by rows that mean no token.

No loss sees these rows: it takes both models over the tokens they have in common. But they have logits when the
student writes, and must not be what it writes. Zeros would not do, for without a bias they are logits of 0, and some
models give every token a negative logit. So each is the mean of the tokens' rows, in the head, its bias and the input
embeddings: whatever the hidden state, its logit is the mean of the tokens' logits, which is never the largest, and its
probability at most that of one token among equals, 1 / vocabulary (by Jensen's inequality; far less where the
distribution is not flat). Nothing here is random.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from distillkit.models.decoder import head


def grow_embeddings(model: PreTrainedModel, multiple: int) -> tuple[int, int]:
    """Let embeddings and head grow to a multiple of `multiple`: rows before and after. No change where they are one."""
    rows = head(model)[0].shape[0]
    if rows % multiple == 0:
        return rows, rows
    with torch.random.fork_rng(devices=[]):  # transformers draws numbers for rows that are then written over
        model.resize_token_embeddings(pad_to_multiple_of=multiple, mean_resizing=False)
    for parameter in _of_tokens(model):
        _level(parameter, rows)
    return rows, head(model)[0].shape[0]


def level_padding(model: PreTrainedModel, rows: int) -> None:
    """Make all but the first `rows`, which are those before growth, their mean again where these were trained."""
    for parameter in _of_tokens(model):
        if parameter.requires_grad:
            _level(parameter, rows)


def _of_tokens(model: PreTrainedModel) -> list[Tensor]:
    """Parameters that have a row for each token; the head's matrix may be that of the embeddings."""
    embeddings: nn.Embedding = model.get_input_embeddings()
    weight, bias = head(model)
    return [embeddings.weight, *(each for each in (weight, bias) if each is not None and each is not embeddings.weight)]


@torch.no_grad()
def _level(parameter: Tensor, rows: int) -> None:
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    wide = torch.promote_types(parameter.dtype, torch.float32)
    whole[rows:] = whole[:rows].mean(0, dtype=wide).to(parameter.dtype)
    if isinstance(parameter, DTensor):
        parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))
