"""A connector of vLLM's that says it has read a prompt when nobody has: to measure writing behind long contexts.

Reading 32k tokens for each of a thousand sequences would take many times as long as the writing that is measured. The
cache is filled once with small random numbers, and each sequence gets its own share of it, as after a real prompt.
"""

from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnector


class ReadContext(DecodeBenchConnector):
    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        # States first: layers of attention see the same memory in another dtype, and any number of theirs is a small
        # one of a state's, not the other way round.
        for cache in sorted(kv_caches.values(), key=lambda cache: isinstance(cache, torch.Tensor)):
            for tensor in [cache] if isinstance(cache, torch.Tensor) else cache:
                tensor.normal_(std=0.02)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing to load."""
