"""How much of a long context a model can find again: needles in a haystack, by length and depth.

Answers are what the model goes on with, greedily, for at most 128 tokens, as in RULER; a sample's score is the share of
its wanted values that are in there. A model that has given them all is not asked for more.

Prompts of one length are read and answered together, whatever their depth: a small model on a GPU takes as long for the
next token of eight prompts as for that of one.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distillkit.config.data import DatasetSource
from distillkit.config.errors import UserError
from distillkit.config.evaluate import NeedlesConfig
from distillkit.data.sources import load_source
from distillkit.evaluation.generation import decode_greedily, end_tokens, left_padded, prefill
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
        progress: told after each batch how many prompt tokens of how many are done.

    Raises:
        UserError: there is no haystack and the task needs one, or a length is too short for it.
    """
    wanted = TASKS[task]
    prose = _read(settings.haystack, max(settings.lengths)) if wanted.haystack == "essay" else ""
    samples = settings.samples if limit is None else min(settings.samples, limit)
    depths = _evenly(settings.depths)
    done, total = 0, sum(settings.lengths) * settings.depths * samples
    rows = []
    for length in settings.lengths:
        essay = Essay(prose[: length * CHARACTERS_PER_TOKEN])
        prompts = [
            build_prompt(wanted, tokenizer, length, depth, f"{settings.seed} {task} {length} {depth} {sample}", essay)
            for depth in depths
            for sample in range(samples)
        ]
        scores = [0.0] * len(prompts)
        for batch in _batches(prompts, settings.batch_size):
            together = [prompts[index] for index in batch]
            for index, score in zip(batch, _scores(model, tokenizer, together, settings.prefill_tokens), strict=True):
                scores[index] = score
            done += length * len(batch)
            progress(done, total)
        for index, depth in enumerate(depths):
            of_depth = slice(index * samples, (index + 1) * samples)
            row = {"length": length, "depth": depth, "correct": sum(scores[of_depth]), "total": samples}
            tokens = sum(len(prompt.token_ids) for prompt in prompts[of_depth])
            rows.append({**row, "prompt_tokens_mean": tokens / samples})
    return rows


def _evenly(depths: int) -> list[float]:
    """From 0 to 1; a single depth is the middle."""
    return [0.5] if depths == 1 else [index / (depths - 1) for index in range(depths)]


def _batches(prompts: list[Prompt], size: int) -> Iterator[list[int]]:
    """Indices of the prompts; those of like numbers of tokens stand together, so that little or nothing is padded."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].token_ids))
    for start in range(0, len(order), size):
        yield order[start : start + size]


class _Answer:
    """What a model writes to a prompt, until it has given all values or ends."""

    def __init__(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> None:
        self.prompt, self.tokenizer, self.ends = prompt, tokenizer, ends
        self.written: list[int] = []
        self.score = 0.0
        """Share of the wanted values that are in there, whether letters are large or small."""
        self.over = False

    def add(self, token_id: int) -> None:
        """What comes after the end does not count."""
        self.over = self.over or token_id in self.ends
        if self.over:
            return
        self.written.append(token_id)
        text = self.tokenizer.decode(self.written, skip_special_tokens=True).lower()
        wanted = self.prompt.wanted
        self.score = sum(value.lower() in text for value in wanted) / len(wanted)
        self.over = self.score == 1


def _scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], tokens_at_a_time: int
) -> list[float]:
    """Of prompts that are read and answered together."""
    input_ids, attention_mask = left_padded([prompt.token_ids for prompt in prompts], next(model.parameters()).device)
    piece = max(tokens_at_a_time // len(prompts), 1)
    logits, cache = prefill(model, input_ids, piece, attention_mask)
    answers = [_Answer(prompt, tokenizer, end_tokens(model)) for prompt in prompts]
    for tokens in islice(decode_greedily(model, logits, cache, attention_mask), ANSWER_TOKENS):
        for answer, token_id in zip(answers, tokens.tolist(), strict=True):
            answer.add(token_id)
        if all(answer.over for answer in answers):
            break
    return [answer.score for answer in answers]


def _read(source: DatasetSource | None, tokens: int) -> str:
    """As much of the column `text` as a haystack of `tokens` may take; nothing where there is no source."""
    if source is None:
        return ""
    rows = load_source(source, "needles.haystack")
    if "text" not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise UserError("needles.haystack", f"a haystack is read from column text, and there is none; it has {columns}")
    texts: list[str] = []
    missing = tokens * CHARACTERS_PER_TOKEN
    for text in rows["text"]:
        texts.append(text or "")
        missing -= len(texts[-1])
        if missing <= 0:
            break
    return " ".join(texts)
