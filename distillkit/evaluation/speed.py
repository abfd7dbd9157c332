"""Speed of prefill and decoding at a length of context, and memory.

Sizes are those of the tensors in the cache after prefill, not of a formula. Times are medians over the repeats: of the
first token from the prompt to its end, of decoding from the fourth token to the last, with the device synchronised
before and after. A first round and the first steps, in which kernels are compiled and selected and CUDA graphs
recorded, count neither for times nor for memory.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, islice
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from distillkit.config.evaluate import SpeedConfig
from distillkit.evaluation.generation import decode_greedily, prefill

RECORDED_STEPS = 3
"""Of decoding: torch.compile runs a CUDA graph for the third time before it is as fast as it will be."""


def measure_speed(
    model: PreTrainedModel,
    settings: SpeedConfig,
    context: int,
    timed: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Any]:
    """Prefill `context` tokens and decode `settings.decode_tokens` more, for `settings.batch_size` rows at once.

    The tokens are random, and the same for every model of one vocabulary. `timed` is entered when all is compiled.

    Returns: `context`; `prefill_tokens_per_second` and `decode_tokens_per_second`, of all rows together;
        `time_to_first_token_seconds`; `weights_bytes`; `kv_cache_bytes` and `state_bytes` (recurrent and convolution
        states), after the prefill; `peak_bytes` that were allocated on a CUDA device, None elsewhere.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    input_ids = torch.randint(vocabulary, (settings.batch_size, context), generator=generator).to(device)
    first_tokens: list[float] = []
    steps: list[float] = []

    def once(wanted: int) -> dict[str, int]:
        start = _now(device)
        logits, cache = prefill(model, input_ids, settings.prefill_tokens)
        sizes = cache_bytes(cache)
        tokens = decode_greedily(model, logits, cache, at_most=1 + RECORDED_STEPS + wanted)
        next(tokens)
        first_tokens.append(_now(device) - start)
        deque(islice(tokens, RECORDED_STEPS), maxlen=0)
        start = _now(device)
        deque(tokens, maxlen=0)
        steps.append((_now(device) - start) / wanted)
        return sizes

    once(1)
    with timed():
        if device.type == "cuda":  # without the memory that selecting kernels took
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(settings.repeats):
            sizes = once(settings.decode_tokens)
    first_token = median(first_tokens[1:])
    return {
        "context": context,
        "prefill_tokens_per_second": input_ids.numel() / first_token,
        "time_to_first_token_seconds": first_token,
        "decode_tokens_per_second": settings.batch_size / median(steps[1:]),
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
