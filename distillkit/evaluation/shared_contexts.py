"""lm-eval's model of transformers, which reads a context once for all of its continuations.

The options of a question of HellaSwag, ARC or PIQA share its context, which is most of their tokens. lm-eval reads it
again for each; only continuations of one token it answers from one forward already.
"""

from lm_eval.models.huggingface import HFLM

from distillkit.evaluation.generation import batches_by_length, score_continuations

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Texts (None for parts of a text whose whole likelihood is asked), tokens of the context, and of the continuation."""


class SharedContextLM(HFLM):
    """For models that `can_fork` allows."""

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        by_context: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, _) in enumerate(requests):
            by_context.setdefault(tuple(context), []).append(index)
        contexts = [context for context, of in by_context.items() if self._pays([requests[index] for index in of])]
        found: dict[int, tuple[float, bool]] = {}
        options_each = max((len(by_context[context]) for context in contexts), default=1)
        for batch in batches_by_length(contexts, max(1, int(self.batch_size) // options_each)):
            chosen = [contexts[place] for place in batch]
            indices = [index for context in chosen for index in by_context[context]]
            options = [[requests[index][2] for index in by_context[context]] for context in chosen]
            scores = score_continuations(self.model, chosen, options, batch_size=len(batch))
            for index, score in zip(indices, (each for of in scores for each in of), strict=True):
                found[index] = (score.log_probability, score.likeliest)
                self.cache_hook.add_partial("loglikelihood", requests[index][0], found[index])
        rest = [index for index in range(len(requests)) if index not in found]
        theirs = super()._loglikelihood_tokens([requests[index] for index in rest], disable_tqdm, override_bs)
        found |= dict(zip(rest, theirs, strict=True))
        return [found[index] for index in range(len(requests))]

    def _pays(self, requests: list[Request]) -> bool:
        """Whether requests of one context are quicker together, and none is longer than the model."""
        context = len(requests[0][1])
        longest = max(len(continuation) for *_, continuation in requests)
        several = len(requests) > 1 and requests[0][0] is not None
        return several and 1 < longest < context and context + longest <= self.max_length
