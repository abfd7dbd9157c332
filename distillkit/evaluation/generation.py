"""A prompt of any length read in pieces, and what follows it token by token, with the model's own cache.

`generate` of transformers does both, too; here the two can be timed apart, and whoever reads the tokens may stop at any
one. No logits but those of the last token of a piece are ever made.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache


@torch.no_grad()
def prefill(
    model: PreTrainedModel, input_ids: Int[Tensor, "batch tokens"], piece: int
) -> tuple[Float[Tensor, "batch vocab"], Cache]:
    """Logits of the next token and the cache after `input_ids`, rows without padding, read `piece` tokens at a time."""
    logits, cache = None, None
    for tokens in input_ids.split(piece, dim=1):
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits, cache = output.logits[:, -1], output.past_key_values
    assert logits is not None and cache is not None, "a prompt has at least one token"
    return logits, cache


def decode_greedily(
    model: PreTrainedModel, logits: Float[Tensor, "batch vocab"], cache: Cache
) -> Iterator[Int[Tensor, " batch"]]:
    """The likeliest token, what is likeliest after it, and so on without end; `cache` grows along."""
    while True:
        tokens = logits.argmax(-1)
        yield tokens
        with torch.no_grad():
            logits = model(
                input_ids=tokens.unsqueeze(1), past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits[:, -1]


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Tokens that end what the model writes."""
    config = model.config if model.generation_config is None else model.generation_config
    ends = config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
