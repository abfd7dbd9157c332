"""Speed of prefill and decoding at a length of context, and memory.

Sizes are those of the tensors in the cache after prefill, not of a formula. Times are medians over the repeats,
measured with the device synchronised. A first round, in which kernels are compiled and selected, counts neither for
times nor for memory.
"""

import time
from collections.abc import Iterable
from itertools import chain, islice, pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from distillkit.config.evaluate import SpeedConfig
from distillkit.evaluation.generation import decode_greedily, prefill


def measure_speed(model: PreTrainedModel, settings: SpeedConfig, context: int) -> dict[str, Any]:
    """Prefill `context` tokens and decode `settings.decode_tokens` more, for `settings.batch_size` rows at once.

    The tokens are random, and the same for every model of one vocabulary.

    Returns: `context`; `prefill_tokens_per_second` and `decode_tokens_per_second`, of all rows together;
        `time_to_first_token_seconds`; `weights_bytes`; `kv_cache_bytes` and `state_bytes` (recurrent and convolution
        states), after the prefill; `peak_bytes` that were allocated on a CUDA device, None elsewhere.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    input_ids = torch.randint(vocabulary, (settings.batch_size, context), generator=generator).to(device)
    first_tokens, steps = [], []
    sizes: dict[str, int] = {}
    for repeat in range(1 + settings.repeats):
        if repeat == 1 and device.type == "cuda":  # without the memory that selecting kernels took
            torch.cuda.reset_peak_memory_stats(device)
        start = _now(device)
        logits, cache = prefill(model, input_ids, settings.prefill_tokens)
        sizes = cache_bytes(cache)
        moments = [start]
        wanted = settings.decode_tokens if repeat else 1  # the first round only compiles and selects kernels
        for _ in islice(decode_greedily(model, logits, cache), 1 + wanted):
            moments.append(_now(device))
        durations = [end - begin for begin, end in pairwise(moments)]
        first_tokens.append(durations[0])
        steps.append(durations[1:])
        del logits, cache
    first_token = median(first_tokens[1:])
    return {
        "context": context,
        "prefill_tokens_per_second": input_ids.numel() / first_token,
        "time_to_first_token_seconds": first_token,
        "decode_tokens_per_second": settings.batch_size / median(chain.from_iterable(steps[1:])),
        "weights_bytes": _bytes(chain(model.parameters(), model.buffers())),
        **sizes,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def cache_bytes(cache: Cache) -> dict[str, int]:
    """Memory of a cache: `kv_cache_bytes`, which grow with the number of tokens, and `state_bytes`."""
    keys_and_values: list[Tensor] = []
    states: list[Tensor] = []
    for layer in cache.layers:
        for name, held in vars(layer).items():
            tensors = [each for each in (held.values() if isinstance(held, dict) else [held]) if torch.is_tensor(each)]
            (keys_and_values if name in ("keys", "values") else states).extend(tensors)
    return {"kv_cache_bytes": _bytes(keys_and_values), "state_bytes": _bytes(states)}


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once: a view of a long tensor keeps all of it."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _now(device: torch.device) -> float:
    """Time in seconds after the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
