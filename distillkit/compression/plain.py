"""`plain`: the k likeliest tokens and their log-probabilities as they are, `token_ids` and `top_values`."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distillkit.compression.codec import Codec, Columns
from distillkit.compression.rows import DTYPES
from distillkit.config.compression import PlainConfig


class Plain(Codec):
    """Codec that stores ids as int32 and log-probabilities as floating point numbers; -inf stays -inf.

    Decoded log-probabilities are float32.
    """

    kind = "plain"
    columns = ("token_ids", "top_values")

    def __init__(self, config: PlainConfig) -> None:
        stored = {"token_ids": (config.k, torch.int32), "top_values": (config.k, DTYPES[config.dtype])}
        super().__init__(config, config.k, config.vocab_size, stored, torch.float32)

    def _encode(self, ids: Int[Tensor, "tokens k"], logprobs: Float[Tensor, "tokens k"]) -> Columns:
        return {"token_ids": ids, "top_values": logprobs}

    def _decode(self, columns: Columns) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
        return columns["token_ids"], columns["top_values"]
