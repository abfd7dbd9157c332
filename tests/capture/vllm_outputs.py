"""vLLM's outputs in their shape, filled from the logits of a model that runs here.

The classes have those fields of vLLM's classes of the same names that are read, as the source of 0.24.0 has them
(`vllm/logprobs.py`, `vllm/outputs.py`). So has each position its entries: the prompt's or
sampled token first, with its rank in the vocabulary, then the k likeliest. In a dictionary a token comes once; flat,
it comes twice where it is one of the likeliest.
"""

from dataclasses import dataclass, field

import torch


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class FlatLogprobs:
    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | FlatLogprobs


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | FlatLogprobs
    outputs: list[CompletionOutput]
    finished: bool = True


def request_output(logprobs, prompt, k, flat, request_id="0"):
    """What vLLM answers about `prompt` where a model says `logprobs` [tokens, vocab] after each of its tokens."""
    sampled = int(logprobs[-1].argmax())
    about_prompt = [None, *(_position(row, token, k) for row, token in zip(logprobs, prompt[1:], strict=False))]
    about_next = [_position(logprobs[-1], sampled, k)]
    kind = _flat if flat else _dictionaries
    completion = CompletionOutput(0, "", [sampled], kind(about_next))
    return RequestOutput(request_id, list(prompt), kind(about_prompt), [completion])


def _position(row, token, k):
    """(token id, log-probability, rank) of the token itself and the k likeliest."""
    rank = int((row >= row[token]).sum())
    values, ids = row.topk(k)
    likeliest = zip(ids.tolist(), values.tolist(), range(1, k + 1), strict=True)
    return [(token, float(row[token]), rank), *likeliest]


def _dictionaries(positions):
    return [
        None if entries is None else {token: Logprob(logprob, rank) for token, logprob, rank in entries}
        for entries in positions
    ]


def _flat(positions):
    flat = FlatLogprobs()
    for entries in positions:
        flat.start_indices.append(len(flat.token_ids))
        for token, logprob, rank in entries or []:
            flat.token_ids.append(token)
            flat.logprobs.append(logprob)
            flat.ranks.append(rank)
            flat.decoded_tokens.append(None)
        flat.end_indices.append(len(flat.token_ids))
    return flat


class LLM:
    """Takes what `vllm.LLM` takes and answers as it does, from a model of transformers'."""

    def __init__(self, model, *, max_model_len, max_logprobs, trust_remote_code=False, dtype="auto", **engine_args):
        from transformers import AutoModelForCausalLM

        self.engine_args, self.dtype = engine_args, dtype
        self.max_model_len, self.max_logprobs = max_model_len, max_logprobs
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        positions = self.model.config.max_position_embeddings
        if max_model_len > positions:
            raise ValueError(
                f"User-specified max_model_len ({max_model_len}) is greater than\nthe derived ({positions})"
            )
        self.prompts = []

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm=True):
        assert max(sampling_params.prompt_logprobs, sampling_params.logprobs) <= self.max_logprobs
        outputs = []
        for prompt in prompts:
            input_ids = prompt["prompt_token_ids"]
            assert len(input_ids) + sampling_params.max_tokens <= self.max_model_len
            self.prompts.append(input_ids)
            logprobs = self.model(torch.tensor([input_ids])).logits[0].float().log_softmax(-1)
            flat = sampling_params.flat_logprobs
            outputs.append(request_output(logprobs, input_ids, sampling_params.prompt_logprobs, flat))
        return outputs


@dataclass
class SamplingParams:
    max_tokens: int = 16
    temperature: float = 1.0
    prompt_logprobs: int | None = None
    logprobs: int | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
