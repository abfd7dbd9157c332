"""Prefill of prompts of any length in pieces, and greedy decoding, with the model's own cache.

transformers' `generate` does both too. Here the two can be timed separately, and the caller may stop after any token.
Logits are computed for the last token of a piece only.

Rows of unequal length are padded on the left, so that the next token of each comes after the last column. The mask
keeps padding out of attention and states, and positions are counted from a row's first real token. Rows of equal length
need no mask, so faster kernels without masks can run.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache


def left_padded(
    rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"] | None]:
    """The rows as one batch, and its attention mask (0 where a row is padded), None without padding."""
    longest = max(len(row) for row in rows)
    if all(len(row) == longest for row in rows):
        return torch.tensor(rows, device=device), None
    padding = [longest - len(row) for row in rows]
    input_ids = torch.tensor([[0] * more + list(row) for row, more in zip(rows, padding, strict=True)], device=device)
    columns = torch.arange(longest, device=device)
    return input_ids, (columns >= torch.tensor(padding, device=device).unsqueeze(1)).long()


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch tokens"],
    piece: int,
    attention_mask: Int[Tensor, "batch tokens"] | None = None,
) -> tuple[Float[Tensor, "batch vocab"], Cache]:
    """Logits of the next token and the cache after `input_ids`, `piece` tokens of each row at a time.

    Args:
        attention_mask: 0 where a row is padded, on the left; None without padding.
    """
    logits, cache, start = None, None, 0
    for tokens in input_ids.split(piece, dim=1):
        end = start + tokens.shape[1]
        padding = {} if attention_mask is None else _padding(attention_mask[:, :end], tokens.shape[1])
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1, **padding)
        logits, cache, start = output.logits[:, -1], output.past_key_values, end
    assert logits is not None and cache is not None, "a prompt has at least one token"
    return logits, cache


def decode_greedily(
    model: PreTrainedModel,
    logits: Float[Tensor, "batch vocab"],
    cache: Cache,
    attention_mask: Int[Tensor, "batch tokens"] | None = None,
) -> Iterator[Int[Tensor, " batch"]]:
    """The likeliest token, then the likeliest after it, and so on without end; `cache` grows.

    Args:
        attention_mask: the prompt's, if `prefill` had one.
    """
    padding: dict[str, Tensor] = {}
    while True:
        tokens = logits.argmax(-1)
        yield tokens
        if attention_mask is not None:
            attention_mask = torch.nn.functional.pad(attention_mask, (0, 1), value=1)
            padding = _padding(attention_mask, 1)
        with torch.no_grad():
            logits = model(
                input_ids=tokens.unsqueeze(1), past_key_values=cache, use_cache=True, logits_to_keep=1, **padding
            ).logits[:, -1]


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Tokens at which the model stops."""
    config = model.config if model.generation_config is None else model.generation_config
    ends = config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _padding(attention_mask: Int[Tensor, "batch seen"], tokens: int) -> dict[str, Tensor]:
    """Mask and positions for the last `tokens` columns."""
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return {"attention_mask": attention_mask, "position_ids": positions[:, -tokens:]}
