"""Prefill of prompts of any length in pieces, decoding with the model's own cache, and likelihoods of continuations.

transformers' `generate` does both too. Here the two can be timed separately, and the caller may stop after any token.
Logits are computed for the last token of a piece only.

Rows of unequal length are padded on the left, so that the next token of each comes after the last column. The mask
keeps padding out of attention and states, and positions are counted from a row's first real token. Rows of equal length
need no mask, so faster kernels without masks can run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache, StaticLayer

from distillkit.config.errors import UserError
from distillkit.distribution import at_least_float32
from distillkit.student.network.cache import RecurrentCacheLayer
from distillkit.student.network.mixers import with_mixer_layers

CAPACITY_STEP = 1024
"""Static caches hold a multiple of so many tokens, so that prompts of about one length need one graph."""

CHUNK_BYTES = 2**24
"""Of a float32 copy of logits that likelihoods are computed from, at most."""

NOT_NUMBERS = "the model's logits are not numbers (NaN)"

GENERATED_CAPACITY = 2048
"""Tokens that a static cache of `generate` holds at least: questions and answers of most tasks need one graph."""


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


def batches_by_length(rows: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Batches of indices, sorted by the rows' number of tokens, so that there is little or no padding."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def check_numbers(logits: Tensor) -> None:
    """Raises `UserError` where logits are NaN, whose largest would be a token like any other."""
    if logits.isnan().any():
        raise UserError(None, NOT_NUMBERS)


def likelihoods(
    logits: Float[Tensor, "batch tokens vocab"],
    asked: Sequence[tuple[int, int, int]],
    *,
    temperature: float = 1.0,
    in_dtype: bool = False,
) -> Float64[Tensor, "2 asked"]:
    """The log-probability in nats of each token that is asked for, and 1 where it is the likeliest, else 0; on the CPU.

    So many of them at a time that a float32 copy of their logits has at most `CHUNK_BYTES`.

    Args:
        asked: row, column and token.
        in_dtype: as lm-eval does it: log-probabilities are rounded to the dtype of the logits (else they are of float32
            at least), and the likeliest is the largest of these.

    Raises `UserError` where one is NaN, as all of a row are if any of its logits is.
    """
    found = []
    at_once = max(CHUNK_BYTES // (4 * logits.shape[-1]), 1)
    for rows, columns, tokens in (part.unbind(1) for part in torch.tensor(asked, device=logits.device).split(at_once)):
        each = logits[rows, columns]
        scaled = each if in_dtype else at_least_float32(each)
        log_probabilities = (scaled if temperature == 1 else scaled / temperature).log_softmax(-1)
        chosen = log_probabilities.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).double()
        likeliest = (log_probabilities if in_dtype else each).argmax(-1) == tokens
        found.append(torch.stack([chosen, likeliest.double()]))
    on_cpu = torch.cat(found, dim=1).cpu()
    if on_cpu.isnan().any():
        raise UserError(None, NOT_NUMBERS)
    return on_cpu


@torch.no_grad()
def log_probability(
    model: PreTrainedModel,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    columns: int | None = None,
    batch_size: int,
) -> list[float]:
    """The log-probability of each continuation after its context, in nats, summed over its tokens; both have some.

    columns: to which the logits are cut, where the head is wider than the vocabulary.

    Raises `UserError` where logits are NaN.
    """
    rows = [[*before, *after] for before, after in zip(contexts, continuations, strict=True)]
    found = [0.0] * len(rows)
    for batch in batches_by_length(rows, batch_size):
        input_ids, mask = left_padded([rows[index] for index in batch], next(model.parameters()).device)
        padding = {} if mask is None else _padding(mask, input_ids.shape[1])
        lengths = [len(continuations[index]) for index in batch]
        output = model(input_ids=input_ids, use_cache=False, logits_to_keep=max(lengths) + 1, **padding)
        asked = [
            (place, column - len(continuations[index]) - 1, token)
            for place, index in enumerate(batch)
            for column, token in enumerate(continuations[index])
        ]
        chosen, _ = likelihoods(output.logits[..., :columns], asked, temperature=temperature)
        for index, each in zip(batch, chosen.split(lengths), strict=True):
            found[index] = each.sum().item()
    return found


@dataclass(frozen=True)
class Score:
    """Of a continuation: its log-probability in nats, summed over its tokens; whether each token is the likeliest."""

    log_probability: float
    likeliest: bool


@torch.no_grad()
def score_continuations(
    model: PreTrainedModel,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int,
    tokens_at_a_time: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[Score]]:
    """The scores of each context's continuations; all have tokens.

    A context is read once, and its continuations go on from its cache, which `can_fork` must allow where a context has
    several of more than one token.

    Args:
        batch_size: contexts per batch.
        tokens_at_a_time: of all contexts of a batch; all by default.
        progress: called after each batch with the contexts that are done, and all of them.

    Raises `UserError` where logits are NaN.
    """
    found: list[list[Score]] = [[] for _ in contexts]
    done = 0
    for batch in batches_by_length(contexts, batch_size):
        input_ids, mask = left_padded([contexts[index] for index in batch], next(model.parameters()).device)
        piece = input_ids.shape[1] if tokens_at_a_time is None else max(tokens_at_a_time // len(batch), 1)
        first, cache = prefill(model, input_ids, piece, mask)
        asked = [(row, index, list(each)) for row, index in enumerate(batch) for each in continuations[index]]
        longest = max(len(tokens) for *_, tokens in asked)
        likely = torch.zeros(2, len(asked), longest, dtype=torch.float64)
        likely[..., 0] = likelihoods(first.unsqueeze(1), [(row, 0, tokens[0]) for row, _, tokens in asked])
        if longest > 1:
            if len(asked) > len(batch):
                rows = torch.tensor([row for row, *_ in asked])  # on the CPU: layers may lie on several devices
                cache.batch_select_indices(rows)
                mask = None if mask is None else mask[rows]
            padded = [tokens[:-1] + [0] * (longest - len(tokens)) for *_, tokens in asked]  # nothing comes behind it
            padding = {} if mask is None else _padding(F.pad(mask, (0, longest - 1), value=1), longest - 1)
            rest = model(
                input_ids=torch.tensor(padded, device=input_ids.device),
                past_key_values=cache,
                use_cache=True,
                **padding,
            ).logits
            behind = [
                (place, column, token)
                for place, (*_, tokens) in enumerate(asked)
                for column, token in enumerate(tokens[1:])
            ]
            places, columns, _ = torch.tensor(behind).unbind(1)
            likely[:, places, columns + 1] = likelihoods(rest, behind)
        for (_, index, tokens), log_probabilities, likeliest in zip(asked, *likely, strict=True):
            count = len(tokens)
            found[index].append(Score(log_probabilities[:count].sum().item(), bool(likeliest[:count].all())))
        done += len(batch)
        progress(done, len(contexts))
    return found


@torch.no_grad()
def score_last_tokens(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
) -> list[list[Score]]:
    """The scores of continuations that a batch of rows was read for, as lm-eval has them: in the dtype of the logits.

    A row lacks its last token: of a continuation, the first token stands for the next of all but so many tokens of the
    row, the last for the next of the whole row. Padding is on the right, where causal models do not see it.

    Raises `UserError` where logits are NaN.
    """
    longest = max(map(len, rows))
    kept = longest - min(
        len(row) - len(each) for row, options in zip(rows, continuations, strict=True) for each in options
    )
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    logits = model(padded.to(next(model.parameters()).device), use_cache=False, logits_to_keep=kept).logits
    asked, lengths = [], []
    for place, (row, options) in enumerate(zip(rows, continuations, strict=True)):
        for tokens in options:
            start = logits.shape[1] - longest + len(row) - len(tokens)
            asked += [(place, start + index, token) for index, token in enumerate(tokens)]
            lengths.append(len(tokens))
    chosen, likeliest = (each.split(lengths) for each in likelihoods(logits, asked, in_dtype=True))
    scores = (
        Score(one.to(logits.dtype).sum().item(), bool(other.all()))
        for one, other in zip(chosen, likeliest, strict=True)
    )
    return [[next(scores) for _ in options] for options in continuations]


@torch.no_grad()
def can_fork(model: PreTrainedModel) -> bool:
    """Whether rows of the model's cache can be repeated, so that several continuations go on from one context.

    They cannot where there is none under this name (the first GPT, RWKV, Mamba), or layers keep what is not known here.
    """
    device = next(model.parameters()).device
    output = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=True)
    cache, known = getattr(output, "past_key_values", None), (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(cache, Cache) and all(type(layer) in (*known, RecurrentCacheLayer) for layer in cache.layers)


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
    *,
    at_most: int,
) -> Iterator[Int[Tensor, " batch"]]:
    """The likeliest token, then the likeliest after it, and so on; `cache` is used up.

    Args:
        attention_mask: the prompt's, if `prefill` had one.
        at_most: tokens.
    """
    step = decoding_step(model, cache, attention_mask, at_most=at_most)
    for remaining in range(at_most - 1, -1, -1):
        tokens = logits.argmax(-1)
        yield tokens
        if remaining:
            logits = step(tokens)


def decoding_step(
    model: PreTrainedModel,
    cache: Cache,
    attention_mask: Int[Tensor, "batch tokens"] | None = None,
    *,
    at_most: int,
) -> Callable[[Int[Tensor, " batch"]], Float[Tensor, "batch vocab"]]:
    """A function that reads one more token of each row and gives the logits of the next; for `at_most` calls.

    For a model that is to decode as graphs (`decode_as_graphs`), a call is a CUDA graph: what it returns holds until
    the next one.

    Args: as of `decode_greedily`.
    """
    settings, static = model.generation_config, None
    if settings is not None and settings.cache_implementation == "static":
        static = _static(model, cache, at_most)
    forward = model if static is None else model.get_compiled_call(settings.compile_config)
    cache = cache if static is None else static
    mask = attention_mask

    @torch.no_grad()
    def step(tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        nonlocal mask
        given: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}
        if mask is not None:
            mask = F.pad(mask, (0, 1), value=1)
            given |= _padding(mask, 1)
        if static is not None:  # the mask of full attention is made ahead of the graph
            given = model.prepare_inputs_for_generation(tokens.unsqueeze(1), past_key_values=cache, **given)
            torch.compiler.cudagraph_mark_step_begin()
            with torch.compiler.set_stance("default"):  # also where all else that is compiled runs eagerly
                return forward(**given).logits[:, -1]
        return forward(input_ids=tokens.unsqueeze(1), past_key_values=cache, **given).logits[:, -1]

    return step


def decode_as_graphs(model: PreTrainedModel) -> None:
    """Let the model decode with a static cache, each step of it compiled, as a CUDA graph; only where it is on CUDA.

    Compiling takes about a minute for a model of 36 layers, once for a number of rows. `generate` does so, too.
    """
    one_device = len(set(getattr(model, "hf_device_map", {"": 0}).values())) == 1
    if model.device.type == "cuda" and one_device and model.generation_config is not None:
        model.generation_config.cache_implementation = "static"
        model.generation_config.max_cache_len = GENERATED_CAPACITY


@contextmanager
def decoding_as_graphs(model: PreTrainedModel) -> Iterator[None]:
    """Within, as `decode_as_graphs`; then as before. Weights may change where they are, as in training."""
    settings = model.generation_config
    before = None if settings is None else (settings.cache_implementation, settings.max_cache_len)
    decode_as_graphs(model)
    try:
        yield
    finally:
        if settings is not None and before is not None:
            settings.cache_implementation, settings.max_cache_len = before


def _static(model: PreTrainedModel, cache: Cache, room: int) -> StaticCache | None:
    """The content of a cache, layer by layer taken out of it, in a static one with room for so many tokens more.

    None, and the cache is as it was, where a layer keeps a window of tokens, and where `generate` would not compile a
    step either: on a CPU, with weights that are elsewhere.
    """
    length = cache.get_seq_length()
    static = StaticCache(config=model.config, max_cache_len=-(-(length + room) // CAPACITY_STEP) * CAPACITY_STEP)
    if mixers := getattr(model.config, "mixers", None):
        with_mixer_layers(static, mixers)
    windows = any(type(layer) not in (StaticLayer, RecurrentCacheLayer) for layer in static.layers)
    if windows or not model._valid_auto_compile_criteria({"past_key_values": static}, model.generation_config):
        return None
    for index, (old, new) in enumerate(zip(cache.layers, static.layers, strict=True)):
        if isinstance(new, RecurrentCacheLayer):
            new.store(old.conv_state, old.recurrent_state)
            new.count(length)
        else:
            new.update(old.keys, old.values)
        cache.layers[index] = new
    return static


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Tokens at which the model stops."""
    config = model.config if model.generation_config is None else model.generation_config
    ends = config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _padding(attention_mask: Int[Tensor, "batch seen"], tokens: int) -> dict[str, Tensor]:
    """Mask and positions for the last `tokens` columns."""
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return {
        "attention_mask": attention_mask,
        "position_ids": positions[:, -tokens:].contiguous(),
    }  # strides are part of a graph
