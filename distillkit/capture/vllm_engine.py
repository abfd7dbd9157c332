"""A teacher run by vLLM: its log-probabilities of a prompt, as the distributions that a capture stores.

Each document is a request; vLLM batches them. With `prompt_logprobs` it returns, for each token of the prompt, the
log-probability of that token and of the k likeliest ones, given the tokens before it. So the entries at a token are the
teacher distribution of the position before, and those of the one generated token are that of the last position.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from distillkit.capture.engines import Row, TopKBatch
from distillkit.config import HFTeacherConfig, UserError
from distillkit.distribution import SparseDistribution
from distillkit.models.loading import load_pretrained_config, refuse_adapter

TOKENS_AT_ONCE = 2**15
"""Tokens of the requests in one call of vLLM: it returns Python numbers, about 100 bytes for each of k per token."""

LOGITS_AT_ONCE = 2**28
"""Of prompts in one step of vLLM, 1 GiB in float32: it leaves no room for them when it reserves memory."""
LEAST_TOKENS = 1024
"""In one step: at least as many as the sequences that vLLM runs side by side."""

Entries = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Number of entries of each position; then token ids and log-probabilities of all entries, position after position."""


class VLLMEngine:
    """Runs the teacher by vLLM, on its GPUs.

    Args:
        teacher: its `kwargs` are those of `vllm.LLM`: `dtype`, `tensor_parallel_size`, `revision`, ...
        k: log-probabilities per token, which vLLM has to know when it starts.
        sequence_length: tokens of the longest document.

    Raises:
        UserError: vLLM is not installed, or does not start with this teacher.
    """

    def __init__(
        self, teacher: HFTeacherConfig, k: int, sequence_length: int, *, trust_remote_code: bool = False
    ) -> None:
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise UserError(
                "engine",
                f"vllm cannot be imported ({error}); pip install 'distillkit[capture]', or engine: transformers",
            ) from error
        kwargs = {"dtype" if name == "torch_dtype" else name: value for name, value in teacher.kwargs.items()}
        where = {"revision": kwargs["revision"]} if "revision" in kwargs else {}
        config = load_pretrained_config(teacher.path, key="teacher.path", trust_remote_code=trust_remote_code, **where)
        refuse_adapter(teacher.path, where, "teacher.path")
        longest = kwargs.pop("max_model_len", sequence_length + 1)  # and the token that is generated
        if longest <= sequence_length:
            raise UserError(
                "teacher.kwargs.max_model_len",
                f"is {longest}, but vLLM generates a token after each row of "
                f"{sequence_length}; give at least {sequence_length + 1}, or remove it",
            )
        self.device = torch.device("cpu")
        self.vocabulary_size: int = config.get_text_config().vocab_size
        # vLLM's own choice for a checkpoint of float32 is bfloat16, another teacher.
        checkpoint = str(config.get_text_config().dtype or "auto").removeprefix("torch.")
        defaults = {
            "dtype": checkpoint,
            "max_num_batched_tokens": max(LOGITS_AT_ONCE // self.vocabulary_size, LEAST_TOKENS),
        }
        try:
            self._llm = LLM(
                model=teacher.path,
                trust_remote_code=trust_remote_code,
                max_model_len=longest,
                max_logprobs=k,
                logprobs_mode="raw_logprobs",  # of the raw logits: temperature 1, no penalties
                enable_prefix_caching=False,  # a cached prefix has no log-probabilities
                **{**defaults, **kwargs},
            )
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            problem = f"vllm does not start with {teacher.path!r}: {error}"
            if "max_model_len" in str(error):
                problem += f" (it needs sequence_length + 1 = {sequence_length + 1} tokens; perhaps a shorter one fits)"
            raise UserError("engine", problem) from error
        self._params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=k, logprobs=k, flat_logprobs=True, detokenize=False
        )

    def top_k(self, rows: Sequence[Row], k: int, outside: Float[Tensor, " vocab"] | None = None) -> Iterator[TopKBatch]:
        """See `Engine`; `k` is that of the constructor."""
        if outside is not None:
            raise ValueError("vLLM does not return the probabilities outside the top k")
        for batch in _batches(rows):
            prompts = [{"prompt_token_ids": document} for index in batch for document in _documents(rows[index])]
            outputs = self._llm.generate(prompts, self._params, use_tqdm=False)
            found = [sparse_distribution(output, k) for output in outputs]
            distribution = SparseDistribution(
                torch.cat([each.ids for each in found]), torch.cat([each.logprobs for each in found])
            )
            if bool(distribution.logprobs.isnan().any()):
                raise UserError(
                    "teacher.path", "vllm gives NaN for it: its dtype is too narrow (give bfloat16), or it is damaged"
                )
            yield TopKBatch(batch, distribution)


def sparse_distribution(output: Any, k: int) -> SparseDistribution:
    """The teacher distribution at each token of a prompt [tokens, k], from vLLM's `RequestOutput`.

    vLLM returns k or k + 1 entries per token: the k likeliest, and the prompt's own token whatever its rank. Only the k
    likeliest are kept, sorted by falling log-probability.

    output: of a request with `prompt_logprobs=k`, `logprobs=k` and `max_tokens=1`. Both are either lists of
        dictionaries {token id: Logprob} with None for the prompt's first token, or `FlatLogprobs`.
    """
    # The prompt's first token has no entries, because no token precedes it.
    prompt, generated = _entries(output.prompt_logprobs), _entries(output.outputs[0].logprobs)
    counts, ids, logprobs = (np.concatenate(both) for both in zip(prompt, generated, strict=True))
    return _likeliest((counts[1:], ids, logprobs), k)


def _batches(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Indices of the rows of each call of vLLM, in order."""
    batch: list[int] = []
    tokens = 0
    for index, row in enumerate(rows):
        if batch and tokens + len(row["input_ids"]) > TOKENS_AT_ONCE:
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += len(row["input_ids"])
    if batch:
        yield batch


def _documents(row: Row) -> Iterator[list[int]]:
    start = 0
    for length in row["seq_lengths"]:
        yield list(row["input_ids"][start : start + length])
        start += length


def _entries(positions: Any) -> Entries:
    if not isinstance(positions, list):  # FlatLogprobs
        counts = np.subtract(positions.end_indices, positions.start_indices)
        return counts, np.array(positions.token_ids, np.int64), np.array(positions.logprobs, np.float32)
    dictionaries = [position or {} for position in positions]
    ids = np.fromiter(chain.from_iterable(dictionaries), np.int64)
    logprobs = chain.from_iterable(position.values() for position in dictionaries)
    counts = np.array([len(position) for position in dictionaries], np.int64)
    return counts, ids, np.fromiter((entry.logprob for entry in logprobs), np.float32, len(ids))


def _likeliest(entries: Entries, k: int) -> SparseDistribution:
    """A position's first entry is the prompt's own token, which may occur again as one of the likeliest."""
    counts, ids, logprobs = entries
    width = max(k, int(counts.max()))
    row = np.repeat(np.arange(len(counts)), counts)
    column = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    all_ids = np.zeros((len(counts), width), np.int64)
    all_logprobs = np.full((len(counts), width), -np.inf, np.float32)
    all_ids[row, column], all_logprobs[row, column] = ids, logprobs
    again = (all_ids[:, 1:] == all_ids[:, :1]) & (all_logprobs[:, 1:] > -np.inf)
    all_logprobs[again.any(-1), 0] = -np.inf
    order = np.argsort(-all_logprobs, axis=-1, kind="stable")[:, :k]
    kept_ids, kept_logprobs = (np.take_along_axis(values, order, -1) for values in (all_ids, all_logprobs))
    return SparseDistribution(torch.from_numpy(kept_ids), torch.from_numpy(kept_logprobs))
