"""What a teacher is run on for the initialisation of mixers, and how far its heads look back."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def mean_attention_distance(weights: Float[Tensor, "batch heads tokens tokens"]) -> Float[Tensor, " heads"]:
    """Geometric mean of the distances in tokens over which each head attends, from its attention weights.

    The first token does not count: what goes to it is what a head has no other place for. Nor do queries of the first
    eighth, which have nowhere far to look.
    """
    tokens = weights.shape[-1]
    places = torch.arange(tokens, device=weights.device)
    start = tokens // 8
    distance = (places[start:, None] - places[None, 1:]).clamp(min=1)
    weights = weights[:, :, start:, 1:].float()
    total = weights.sum(dim=(0, 2, 3)).clamp(min=torch.finfo(torch.float32).tiny)
    return ((weights * distance.log()).sum(dim=(0, 2, 3)) / total).exp()


def repeated_tokens(vocab_size: int, length: int, generator: torch.Generator | None) -> Int[Tensor, "1 length"]:
    """Random token ids whose second half is the first again, so that heads that look for what was before find it."""
    half = torch.randint(vocab_size, (1, length // 2), generator=generator)
    return torch.cat([half, half], dim=1)


def calibration_tokens(vocab_size: int, generator: torch.Generator | None) -> Int[Tensor, "2 256"]:
    """Token ids drawn at random: they fit the output scale as well as text does, and need no data and no tokenizer."""
    return torch.randint(vocab_size, (2, 256), generator=generator)
