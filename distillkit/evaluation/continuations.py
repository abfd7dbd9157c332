"""The suite `generation`, its task `continuations`: what models write after held-out prompts, teacher beside student.

A continuation is a list of tokens. It ends with an end token where the model ended its text, else after `new_tokens`.
Random numbers belong to the prompt and the position, and a token is where its number falls in the cumulated
probabilities. So a sample does not depend on its batch, and student and teacher draw with the same numbers: their
samples differ as far as their distributions do.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distillkit.config.errors import UserError
from distillkit.config.evaluate import GenerationSuiteConfig
from distillkit.data.sources import load_source
from distillkit.distribution import at_least_float32
from distillkit.evaluation.generation import (
    check_numbers,
    decoding_step,
    end_tokens,
    left_padded,
    log_probability,
    prefill,
)
from distillkit.evaluation.jackknife import Named, with_errors
from distillkit.models.special_tokens import encode_texts

DATASET = "generation.dataset"
GRAM = 4
LOOP_TOKENS, LOOP_ROUNDS = 16, 3
"""A loop is at least so many tokens long, and so many rounds."""

Continuation = list[int]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Written:
    """A model's continuations of the same prompts: the likeliest tokens, and sampled ones."""

    greedy: list[Continuation]
    sampled: list[Continuation]
    ends: frozenset[int]
    """The model's end tokens."""
    log_probabilities: list[float] | None = None
    """The teacher's, of each sampled continuation, in nats, at the temperature of sampling; None without a teacher."""


def read_prompts(
    settings: GenerationSuiteConfig, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> list[list[int]]:
    """The first `prompt_tokens` tokens of documents that have so many, in an order that the seed decides.

    Raises `UserError` for a text that cannot be read, and where no document is long enough.
    """
    texts = _texts(settings)
    wanted = settings.samples if limit is None else min(settings.samples, limit)
    prompts: list[list[int]] = []
    for rows in texts.shuffle(seed=settings.seed).iter(batch_size=64):
        encoded = encode_texts(tokenizer, [text or "" for text in rows[settings.text_field]])
        prompts += [ids[: settings.prompt_tokens] for ids in encoded if len(ids) >= settings.prompt_tokens]
        if len(prompts) >= wanted:
            return prompts[:wanted]
    if not prompts:
        raise UserError(
            "generation.prompt_tokens", f"no document of the text has {settings.prompt_tokens:,} tokens; lower it"
        )
    return prompts


def check_text(settings: GenerationSuiteConfig) -> None:
    """Raises `UserError` where the text cannot be read."""
    _texts(settings)


def _texts(settings: GenerationSuiteConfig) -> Any:
    rows = load_source(settings.dataset, DATASET)
    if settings.text_field not in rows.column_names:
        raise UserError(
            "generation.text_field",
            f"the text has no column {settings.text_field!r}; its columns are {', '.join(rows.column_names)}",
        )
    return rows.select_columns(settings.text_field)


def write(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSuiteConfig,
    teacher: PreTrainedModel | None = None,
    columns: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Written:
    """The model's continuations of prompts of one length.

    Args:
        teacher: tells how likely the samples are.
        columns: to which the logits are cut, where the head is wider than the vocabulary.
        progress: called after each batch with how much is done, and the whole.

    Raises:
        UserError: logits are NaN.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    drawn = torch.rand(len(prompts), settings.new_tokens, generator=generator, dtype=torch.float64)
    greedy: list[Continuation] = []
    sampled: list[Continuation] = []
    for written, numbers in ((greedy, None), (sampled, drawn)):
        for start in range(0, len(prompts), settings.batch_size):
            batch = slice(start, start + settings.batch_size)
            written += continue_prompts(
                model,
                prompts[batch],
                None if numbers is None else numbers[batch],
                new_tokens=settings.new_tokens,
                temperature=settings.temperature,
                ends=end_tokens(model),
                columns=columns,
            )
            progress(len(greedy) + len(sampled), 2 * len(prompts))
    likely = None
    if teacher is not None:
        likely = log_probability(
            teacher,
            prompts,
            sampled,
            temperature=settings.temperature,
            columns=columns,
            batch_size=settings.batch_size,
        )
    return Written(greedy, sampled, frozenset(end_tokens(model)), likely)


@torch.no_grad()
def continue_prompts(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    drawn: Float64[Tensor, "batch new_tokens"] | None,
    *,
    new_tokens: int,
    temperature: float,
    ends: Container[int],
    columns: int | None = None,
) -> list[Continuation]:
    """The model's continuation of each prompt of a batch.

    Args:
        drawn: numbers from 0 to 1 that choose the tokens; None: the likeliest.
        new_tokens: of a continuation at most.
        ends: tokens that end one.
        columns: to which the logits are cut, where the head is wider than the vocabulary.

    Raises:
        UserError: logits are NaN.
    """
    device = next(model.parameters()).device
    input_ids, mask = left_padded(prompts, device)
    logits, cache = prefill(model, input_ids, input_ids.shape[1], mask)
    step = decoding_step(model, cache, mask, at_most=new_tokens)
    rows: list[Continuation] = [[] for _ in prompts]
    for position in range(new_tokens):
        known = logits[:, :columns]
        check_numbers(known)
        chosen = None if drawn is None else drawn[:, position].to(device)
        tokens = known.argmax(-1) if chosen is None else draw(known, chosen, temperature)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if not (row and row[-1] in ends):
                row.append(token)
        if position == new_tokens - 1 or all(row[-1] in ends for row in rows):
            return rows
        logits = step(tokens)
    raise AssertionError("new_tokens is positive")


def drawn_numbers(key: Sequence[int], *shape: int) -> Float64[Tensor, "..."]:
    """Numbers from 0 to 1 that choose tokens, of a shape; they follow from the key alone."""
    seed = np.random.SeedSequence([*key]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(seed) % 2**63)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def draw(
    logits: Float[Tensor, "batch vocab"], numbers: Float64[Tensor, " batch"], temperature: float
) -> Int[Tensor, " batch"]:
    """The token at which the cumulated probabilities pass the row's number, from 0 to 1."""
    cumulated = (at_least_float32(logits) / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    wanted = numbers.unsqueeze(-1) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, wanted, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def measure_continuations(written: Written, teachers: Written | None, new_tokens: int) -> dict[str, Any]:
    """The numbers of this task, for JSON; None where they are unknown.

    `greedy` and `sampled`, each: `repeated_4grams`, the share of 4-grams that stood in the same continuation before;
    `loops`, the share of continuations that end in a loop (`ends_in_loop`); `ended`, the share with an end token;
    `tokens`, their mean number without it; `tokens_at_end`, the same of those that ended.

    `log_probability`: the teacher's mean log-probability of a sampled token, in nats. Beside the teacher's
    continuations also `log_probability_difference` from that of its own samples; and of greedy continuations
    `agreement`, the share of positions with the teacher's token (where only one has ended, they differ);
    `first_difference`, the mean number of tokens before it (all, where there is none); `identical`, the share without
    one; `by_length`, agreement and identical of the first so many tokens.

    `standard_errors` are by the jackknife over prompts.
    """
    parts = {
        name: with_errors(_texts_numbers, _text_sums(rows, written.ends))
        for name, rows in (("greedy", written.greedy), ("sampled", written.sampled))
    }
    found = {"samples": len(written.greedy), **parts}
    if written.log_probabilities is None:
        return found
    sums = _likelihood_sums("", written)
    if teachers is None:
        return {**found, **with_errors(_likelihoods, sums)}
    sums |= _likelihood_sums("teacher_", teachers) | _agreement_sums(written.greedy, teachers.greedy, new_tokens)
    compared = with_errors(lambda sums: {**_likelihoods(sums), **_agreement(sums)}, sums)
    by_length = []
    for length in [*(1 << power for power in range((new_tokens - 1).bit_length())), new_tokens]:
        of_length = with_errors(_agreement, _agreement_sums(written.greedy, teachers.greedy, length))
        by_length.append({"tokens": length, "agreement": of_length["agreement"], "identical": of_length["identical"]})
    return {**found, **compared, "by_length": by_length}


def repeated_grams(tokens: Sequence[int]) -> tuple[int, int]:
    """(4-grams that stood before, all 4-grams)"""
    grams = [tuple(tokens[start : start + GRAM]) for start in range(len(tokens) - GRAM + 1)]
    return len(grams) - len(set(grams)), len(grams)


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether the last n tokens are the same p tokens again and again, for an n of at least 16 and at least 3 p."""
    for period in range(1, len(tokens) // LOOP_ROUNDS + 1):
        length = max(LOOP_TOKENS, LOOP_ROUNDS * period)
        last = tokens[-length:]
        if len(tokens) >= length and all(last[i] == last[i - period] for i in range(period, length)):
            return True
    return False


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens before the first that differs."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _text_sums(continuations: Sequence[Continuation], ends: frozenset[int]) -> Named:
    rows = []
    for each in continuations:
        ended = each[-1] in ends
        text = each[:-1] if ended else each
        repeated, grams = repeated_grams(text)
        looped = not ended and ends_in_loop(text)
        rows.append((1, repeated, grams, looped, ended, len(text), len(text) * ended))
    names = ("prompts", "repeated", "grams", "loops", "ended", "tokens", "tokens_of_ended")
    return dict(zip(names, torch.tensor(rows, dtype=torch.float64).unbind(-1), strict=True))


def _texts_numbers(sums: Named) -> Named:
    return {
        "repeated_4grams": sums["repeated"] / sums["grams"],
        **{name: sums[name] / sums["prompts"] for name in ("loops", "ended", "tokens")},
        "tokens_at_end": sums["tokens_of_ended"] / sums["ended"],
    }


def _likelihood_sums(whose: str, written: Written) -> Named:
    tokens = [len(each) for each in written.sampled]
    return {
        f"{whose}log_probability": torch.tensor(written.log_probabilities, dtype=torch.float64),
        f"{whose}sampled_tokens": torch.tensor(tokens, dtype=torch.float64),
    }


def _likelihoods(sums: Named) -> Named:
    own = sums["log_probability"] / sums["sampled_tokens"]
    if "teacher_log_probability" not in sums:
        return {"log_probability": own}
    teachers = sums["teacher_log_probability"] / sums["teacher_sampled_tokens"]
    return {"log_probability": own, "log_probability_difference": own - teachers}


def _agreement_sums(ours: Sequence[Continuation], theirs: Sequence[Continuation], length: int) -> Named:
    """Of the first `length` tokens of each continuation."""
    rows = []
    for one, other in zip(ours, theirs, strict=True):
        one, other = one[:length], other[:length]
        equal = sum(a == b for a, b in zip(one, other, strict=False))
        rows.append((1, max(len(one), len(other)), equal, first_difference(one, other), one == other))
    names = ("prompts", "positions", "equal", "before", "identical")
    return dict(zip(names, torch.tensor(rows, dtype=torch.float64).unbind(-1), strict=True))


def _agreement(sums: Named) -> Named:
    return {
        "agreement": sums["equal"] / sums["positions"],
        "first_difference": sums["before"] / sums["prompts"],
        "identical": sums["identical"] / sums["prompts"],
    }
