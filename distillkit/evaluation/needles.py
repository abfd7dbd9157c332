"""How much of a long context a model can find again: needles in a haystack, by length and depth.

Answers are what the model goes on with, greedily, for at most 128 tokens, as in RULER; a sample's score is the share of
its wanted values that are in there. A model that has given them all is not asked for more.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any

from torch import tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distillkit.config.data import DatasetSource
from distillkit.config.errors import UserError
from distillkit.config.suites import NeedlesConfig
from distillkit.data.sources import load_source
from distillkit.evaluation.generation import decode_greedily, end_tokens, prefill
from distillkit.evaluation.haystack import TASKS, Essay, Prompt, build_prompt

ANSWER_TOKENS = 128
CHARACTERS_PER_TOKEN = 6
"""Of an essay more is not read than a haystack of the greatest length may take; a shorter one is repeated."""


def measure_needles(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: NeedlesConfig,
    task: str,
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """One row per length and depth: `length`, `depth`, `correct` (sum of scores), `total`, `prompt_tokens_mean`.

    Args:
        model: any causal language model of transformers that can continue from its cache, in evaluation mode.
        task: one of `haystack.TASKS`.
        limit: samples per length and depth, where `settings` has more.
        progress: told after each sample how many prompt tokens of how many are done.

    Raises:
        UserError: there is no haystack and the task needs one, or a length is too short for it.
    """
    wanted = TASKS[task]
    prose = _read(settings.haystack, max(settings.lengths)) if wanted.haystack == "essay" else ""
    samples = settings.samples if limit is None else min(settings.samples, limit)
    done, total = 0, sum(settings.lengths) * settings.depths * samples
    rows = []
    for length in settings.lengths:
        essay = Essay(prose[: length * CHARACTERS_PER_TOKEN])
        for depth in _evenly(settings.depths):
            scores, tokens = [], 0
            for sample in range(samples):
                seed = f"{settings.seed} {task} {length} {depth} {sample}"
                prompt = build_prompt(wanted, tokenizer, length, depth, seed, essay)
                scores.append(_score(model, tokenizer, prompt, settings.prefill_tokens))
                tokens += len(prompt.token_ids)
                done += length
                progress(done, total)
            row = {"length": length, "depth": depth, "correct": sum(scores), "total": samples}
            rows.append({**row, "prompt_tokens_mean": tokens / samples})
    return rows


def _evenly(depths: int) -> list[float]:
    """From 0 to 1; a single depth is the middle."""
    return [0.5] if depths == 1 else [index / (depths - 1) for index in range(depths)]


def _score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, piece: int) -> float:
    """Share of the wanted values in the model's answer, whether letters are large or small."""
    device = next(model.parameters()).device
    logits, cache = prefill(model, tensor([prompt.token_ids], device=device), piece)
    ends, written = end_tokens(model), []
    found = 0
    for token in islice(decode_greedily(model, logits, cache), ANSWER_TOKENS):
        if (token_id := int(token)) in ends:
            break
        written.append(token_id)
        answer = tokenizer.decode(written, skip_special_tokens=True).lower()
        found = sum(value.lower() in answer for value in prompt.wanted)
        if found == len(prompt.wanted):
            break
    return found / len(prompt.wanted)


def _read(source: DatasetSource | None, tokens: int) -> str:
    """As much of the column `text` as a haystack of `tokens` may take; nothing where there is no source."""
    if source is None:
        return ""
    rows = load_source(source, "needles.haystack")
    if "text" not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise UserError(f"needles.haystack: a haystack is read from column text, and there is none; it has {columns}")
    texts: list[str] = []
    missing = tokens * CHARACTERS_PER_TOKEN
    for text in rows["text"]:
        texts.append(text or "")
        missing -= len(texts[-1])
        if missing <= 0:
            break
    return " ".join(texts)
