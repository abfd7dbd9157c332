"""A small server that gives log-probabilities of prompts as vLLM 0.24 does: of a real model, over a real socket.

Each answer is of the form of vLLM's `CompletionResponse`: for each token after the first its own entry, then those of
the k likeliest, by token id as text, each with log-probability, rank and text; impossible tokens have -9999.
"""

import threading

import torch

from tests.evaluation.completions import Completions


class PromptLogprobs(Completions):
    """fail: called with each request's body before it is answered; what it returns replaces the answer.

    most: log-probabilities per token that may be asked for (`--max-logprobs`).
    """

    def __init__(self, model, tokenizer, name, *, fail=None, most=20, **options):
        super().__init__(model, tokenizer, name, **{"max_length": 512, **options})
        self.fail, self.most = fail, most
        self.bodies = []
        self.gate = threading.Semaphore(1)

    @torch.no_grad()
    def complete(self, body):
        with self.lock:
            self.bodies.append(body)
        if self.fail is not None and (instead := self.fail(body)) is not None:
            return instead
        ids, k = body["prompt"], body["prompt_logprobs"]
        if body["model"] != self.name:
            raise ValueError(f"The model `{body['model']}` does not exist.")
        if len(ids) + body["max_tokens"] > self.card["max_model_len"]:
            raise ValueError(f"This model's maximum context length is {self.card['max_model_len']} tokens")
        if k > self.most:
            raise ValueError(f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.most}")
        if max(ids) >= self.model.config.vocab_size:
            raise ValueError(f"Token id {max(ids)} is out of vocabulary")
        with self.gate:
            logprobs = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": "length", "stop_reason": None}
        choice["prompt_logprobs"] = [None, *map(self._entry, logprobs, ids[1:], [k] * (len(ids) - 1))]
        usage = {"prompt_tokens": len(ids), "total_tokens": len(ids) + 1, "completion_tokens": 1}
        return {
            "id": "cmpl-0", "object": "text_completion", "created": 0, "model": self.name, "choices": [choice],
            "usage": usage,
        }  # fmt: skip

    def _entry(self, row, own, k):
        values, tokens = row.topk(k)
        ranked = [
            (own, row[own], int((row >= row[own]).sum())),
            *zip(tokens.tolist(), values, range(1, k + 1), strict=True),
        ]
        return {
            str(token): {
                "logprob": max(float(value), -9999.0),
                "rank": rank,
                "decoded_token": self.tokenizer.decode([token]),
            }
            for token, value, rank in ranked
        }
