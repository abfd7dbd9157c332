"""lm-eval's model of transformers, which reads a context once for all of its continuations.

The options of a question of HellaSwag, ARC or PIQA share its context, which is most of their tokens. lm-eval reads it
again for each; only continuations of one token it answers from one forward already. It also computes the logits of all
tokens of a context, encodes texts one by one, and waits for the GPU several times per request.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix

from distillkit.evaluation.generation import Score, score_continuations, score_last_tokens

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Texts (None for parts of a text whose whole likelihood is asked), tokens of the context, and of the continuation."""

Groups = dict[tuple[int, ...], list[int]]
"""Tokens that are read once, and the indices of the requests that they are read for."""


class SharedContextLM(HFLM):
    """For models that `can_fork` allows."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._encoded: dict[str, list[int]] = {}  # of the texts of the requests that are being answered

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [request.args for request in requests]
        self._encoded = self._encode({context.rstrip() for context, _ in pairs} | {"".join(pair) for pair in pairs})
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        self._encoded = {}
        return found

    def _encode(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """As `tok_encode` does it, those that do not begin with BOS."""
        begin = self.tokenizer.decode(self.prefix_token_id)
        bare = [text for text in texts if not has_bos_prefix(text, begin)]
        options = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        return dict(zip(bare, self.tokenizer(bare, **options).input_ids, strict=True)) if bare else {}

    def tok_encode(self, string: str, *args: Any, **options: Any) -> list[int]:
        if not (args or options) and string in self._encoded:
            return self._encoded[string]
        encoded: list[int] = super().tok_encode(string, *args, **options)
        return encoded

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        assert all(context and 0 < len(tokens) <= self.max_length for _, context, tokens in requests), "as in lm-eval"
        by_context = _grouped((context, index) for index, (_, context, _) in enumerate(requests))
        shared = {context: of for context, of in by_context.items() if self._pays([requests[index] for index in of])}
        together = {index for of in shared.values() for index in of}
        read = ((context + tokens)[-self.max_length - 1 : -1] for _, context, tokens in requests)
        alone = _grouped((row, index) for index, row in enumerate(read) if index not in together)
        found: dict[int, tuple[float, bool]] = {}

        def answer(batch: Groups, scores: list[list[Score]]) -> None:
            for indices, of in zip(batch.values(), scores, strict=True):
                for index, score in zip(indices, of, strict=True):
                    found[index] = (score.log_probability, score.likeliest)
                    if (texts := requests[index][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, found[index])

        def continuations(batch: Groups) -> list[list[list[int]]]:
            return [[requests[index][2] for index in indices] for indices in batch.values()]

        size = int(self.batch_size)
        for batch in _batches(shared, {context: len(of) for context, of in shared.items()}, size):
            answer(batch, score_continuations(self.model, [*batch], continuations(batch), batch_size=len(batch)))
        for batch in _batches(alone, dict.fromkeys(alone, 1), size):
            answer(batch, score_last_tokens(self.model, [*batch], continuations(batch)))
        return [found[index] for index in range(len(requests))]

    def _pays(self, requests: list[Request]) -> bool:
        """Whether requests of one context are quicker together, and none is longer than the model."""
        context = len(requests[0][1])
        longest = max(len(continuation) for *_, continuation in requests)
        several = len(requests) > 1 and requests[0][0] is not None
        return several and 1 < longest < context and context + longest <= self.max_length


def _grouped(read: Iterable[tuple[list[int], int]]) -> Groups:
    groups: Groups = {}
    for tokens, index in read:
        groups.setdefault(tuple(tokens), []).append(index)
    return groups


def _batches(groups: Groups, rows: dict[tuple[int, ...], int], size: int) -> Iterator[Groups]:
    """Groups of about equal numbers of tokens, with at most `size` rows together unless one has more."""
    batch: Groups = {}
    count = 0
    for tokens in sorted(groups, key=len):
        if batch and count + rows[tokens] > size:
            yield batch
            batch, count = {}, 0
        batch[tokens] = groups[tokens]
        count += rows[tokens]
    if batch:
        yield batch
