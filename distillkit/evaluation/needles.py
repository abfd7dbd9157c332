"""Retrieval from a long context: needles in a haystack, by length and depth.

An answer is the model's greedy continuation of at most 128 tokens, as in RULER. A sample's score is the share of the
expected values that the answer contains; generation stops when it contains all of them.

Prompts of one length are a batch, whatever their depth: a small model on a GPU takes as long for the next token of
eight prompts as for that of one.
"""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distillkit.config.data import DatasetSource
from distillkit.config.errors import UserError
from distillkit.config.evaluate import NeedlesConfig
from distillkit.data.sources import load_source
from distillkit.evaluation.generation import batches_by_length, decode_greedily, end_tokens, left_padded, prefill
from distillkit.evaluation.haystack import TASKS, Essay, Prompt, build_prompt

ANSWER_TOKENS = 128
CHARACTERS_PER_TOKEN = 6
"""No more of an essay is read than the longest haystack can hold; a shorter essay is repeated."""


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

    With similar keys also `mistaken`: how many answers have the value of another key, and not the one that is wanted.

    Args:
        model: any causal language model of transformers that can continue from its cache, in evaluation mode.
        task: one of `haystack.TASKS`.
        limit: samples per length and depth, where `settings` has more.
        progress: called after each batch with the prompt tokens that are done, and all of them.

    Raises:
        UserError: the task needs a haystack and there is none, or a length is too short for the task.
    """
    definition = TASKS[task]
    prose = read_haystack(settings.haystack, max(settings.lengths)) if definition.haystack == "essay" else ""
    samples = settings.samples if limit is None else min(settings.samples, limit)
    depths = _evenly(settings.depths)
    done, total = 0, sum(settings.lengths) * settings.depths * samples
    rows = []
    for length in settings.lengths:
        essay = Essay(prose[: length * CHARACTERS_PER_TOKEN])
        prompts = [
            build_prompt(
                definition, tokenizer, length, depth, f"{settings.seed} {task} {length} {depth} {sample}", essay
            )
            for depth in depths
            for sample in range(samples)
        ]
        scores, mistaken = [0.0] * len(prompts), [False] * len(prompts)
        for batch in batches_by_length([prompt.token_ids for prompt in prompts], settings.batch_size):
            chosen = [prompts[index] for index in batch]
            for index, answer in zip(batch, _answers(model, tokenizer, chosen, settings.prefill_tokens), strict=True):
                scores[index], mistaken[index] = answer.score, answer.mistaken
            done += length * len(batch)
            progress(done, total)
        for index, depth in enumerate(depths):
            samples_of_depth = slice(index * samples, (index + 1) * samples)
            row = {"length": length, "depth": depth, "correct": sum(scores[samples_of_depth]), "total": samples}
            if definition.similar:
                row["mistaken"] = sum(mistaken[samples_of_depth])
            tokens = sum(len(prompt.token_ids) for prompt in prompts[samples_of_depth])
            rows.append({**row, "prompt_tokens_mean": tokens / samples})
    return rows


def _evenly(depths: int) -> list[float]:
    """Depths from 0 to 1; a single one is 0.5."""
    return [0.5] if depths == 1 else [index / (depths - 1) for index in range(depths)]


class _Answer:
    """A model's continuation of a prompt, until it contains all values or ends."""

    def __init__(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> None:
        self.prompt, self.tokenizer, self.ends = prompt, tokenizer, ends
        self.written: list[int] = []
        self.score = 0.0
        """Share of the expected values that it contains, without regard to case."""
        self.mistaken = False
        """Whether it has the value of another key, and not all expected ones."""
        self.over = False

    def add(self, token_id: int) -> None:
        """Add a token; after the end it has no effect."""
        self.over = self.over or token_id in self.ends
        if self.over:
            return
        self.written.append(token_id)
        text = self.tokenizer.decode(self.written, skip_special_tokens=True).lower()
        wanted = self.prompt.wanted
        self.score = sum(value.lower() in text for value in wanted) / len(wanted)
        self.over = self.score == 1
        self.mistaken = not self.over and any(value.lower() in text for value in self.prompt.others)


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], tokens_at_a_time: int
) -> list[_Answer]:
    """Answers to a batch of prompts."""
    input_ids, attention_mask = left_padded([prompt.token_ids for prompt in prompts], next(model.parameters()).device)
    piece = max(tokens_at_a_time // len(prompts), 1)
    logits, cache = prefill(model, input_ids, piece, attention_mask)
    answers = [_Answer(prompt, tokenizer, end_tokens(model)) for prompt in prompts]
    for tokens in decode_greedily(model, logits, cache, attention_mask, at_most=ANSWER_TOKENS):
        for answer, token_id in zip(answers, tokens.tolist(), strict=True):
            answer.add(token_id)
        if all(answer.over for answer in answers):
            break
    return answers


def read_haystack(source: DatasetSource | None, tokens: int) -> str:
    """As much of the column `text` as a haystack of `tokens` can hold; nothing without a source."""
    return "" if source is None else read_prose(source, tokens, "needles.haystack", "text")


def read_prose(source: DatasetSource, tokens: int, key: str, column: str) -> str:
    """As much of a column's texts, one after the other, as `tokens` tokens can be.

    key: the key of the YAML that holds the source, for error messages.
    """
    rows = load_source(source, key)
    if column not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise UserError(key, f"has no column {column}, which the haystack is read from; its columns are {columns}")
    texts: list[str] = []
    missing = tokens * CHARACTERS_PER_TOKEN
    for text in rows[column]:
        texts.append(text or "")
        missing -= len(texts[-1])
        if missing <= 0:
            break
    return " ".join(texts)
