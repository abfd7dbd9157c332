"""The suite `generation`, its task `choices`: whether a model knows answers, and whether it can give them as asked.

The same multiple-choice questions are asked in three forms. Letters: the options stand behind A, B, …, and the
likeliest letter counts. Cloze: no option stands in the prompt, and the option with the largest log-likelihood per
character counts. Generated: the prompt with letters is continued greedily, and the answer is read from the text. A
model that has lost the format, not the knowledge, keeps its cloze accuracy alone.

With letters each question is asked in two orders: as it is, and rotated by a number of places that the seed chooses, so
that every option has another letter.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distillkit.config.errors import UserError
from distillkit.config.evaluate import GenerationSuiteConfig
from distillkit.data.sources import load_source
from distillkit.evaluation.generation import (
    batches_by_length,
    check_numbers,
    decode_greedily,
    end_tokens,
    left_padded,
    log_probability,
    prefill,
)
from distillkit.evaluation.jackknife import Named, with_errors
from distillkit.models.special_tokens import encode_texts

KEY = "generation.questions"
ANSWER_TOKENS = 8
_ANSWER = re.compile(r"[\s(\[*\"']*([A-Z])[ \t]*(?:$|[\n.,:;)\]*\"'])")


@dataclass(frozen=True)
class Question:
    """A question, its options, and which of them is right."""

    text: str
    options: list[str]
    answer: int

    def rotated(self, places: int) -> "Question":
        """Each option so many places further on, the last ones at the beginning."""
        count = len(self.options)
        options = [self.options[(index - places) % count] for index in range(count)]
        return Question(self.text, options, (self.answer + places) % count)

    def with_letters(self) -> str:
        """The question with its options behind letters, up to the answer."""
        lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, self.options, strict=False)]
        return "\n".join([f"Question: {self.text}", *lines, "Answer:"])

    def without_options(self) -> str:
        """The question alone, up to the answer."""
        return f"Question: {self.text}\nAnswer:"


def read_questions(settings: GenerationSuiteConfig) -> list[Question]:
    """All questions, in their order; none without a source.

    Raises `UserError` for a source that cannot be read, and a row that is no question.
    """
    if settings.questions is None:
        return []
    rows = load_source(settings.questions, KEY)
    answers = next((name for name in ("answer", "answerKey") if name in rows.column_names), None)
    missing = [name for name in ("question", "choices") if name not in rows.column_names]
    if missing or answers is None:
        raise UserError(
            KEY,
            f"has no column {[*missing, 'answer'][0]}; needed are question, choices and answer (or answerKey), its "
            f"columns are {', '.join(rows.column_names)}",
        )
    questions = [_question(index, row, row[answers]) for index, row in enumerate(rows)]
    if len(questions) <= settings.num_fewshot:
        raise UserError(
            "generation.num_fewshot", f"must be less than the number of questions, {len(questions)}; lower it"
        )
    return questions


def _question(index: int, row: dict[str, Any], answer: Any) -> Question:
    """choices: texts, or texts and labels as ARC has them. answer: an index from 0, a label or a letter."""
    choices = row["choices"]
    if isinstance(choices, dict):
        options, labels = choices.get("text"), choices.get("label")
    else:
        options, labels = choices, None
    if not isinstance(options, list) or not 2 <= len(options) <= len(ascii_uppercase) or not all(options):
        raise UserError(KEY, f"row {index} has no list of 2 to 26 choices, each with a text")
    if not isinstance(answer, int):
        labels = labels or list(ascii_uppercase[: len(options)])
        answer = labels.index(answer) if answer in labels else -1
    if not 0 <= answer < len(options):
        raise UserError(KEY, f"the answer of row {index} is none of its choices; give its index from 0 or its letter")
    return Question(str(row["question"]), [str(option) for option in options], answer)


def parse_letter(text: str, letters: str) -> int | None:
    """The index of the letter that an answer begins with; None where it begins with none of them.

    Spaces, quotes, brackets and * may stand before it; behind it comes a point, another mark, a line break or the end.
    So `B`, ` (B) because`, `**B**` and `B. Iron` are answers, `Iron`, `A planet` and `F` (of four options) are none.
    """
    found = _ANSWER.match(text)
    return letters.index(found[1]) if found and found[1] in letters else None


def measure_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: GenerationSuiteConfig,
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """The numbers of this task, for JSON, with `standard_errors` by the jackknife over questions.

    `questions` asked; `chance`, the accuracy of guessing; `letter_accuracy`, `cloze_accuracy` and `generated_accuracy`
    (what cannot be read is wrong); `same_answer`, the share of questions with the same answer in both orders;
    `unparsed`, the share of generated answers that begin with no letter of the question.

    Raises:
        UserError: the questions cannot be read, or logits are NaN.
    """
    everything = read_questions(settings)
    rng = random.Random(settings.seed)
    rng.shuffle(everything)
    examples, rest = everything[: settings.num_fewshot], everything[settings.num_fewshot :]
    asked = rest[: settings.num_questions if limit is None else min(settings.num_questions, limit)]
    places = [rng.randrange(1, len(question.options)) for question in asked]
    turned = [question.rotated(each) for question, each in zip(asked, places, strict=True)]
    shown = [each.rotated(index - each.answer) for index, each in enumerate(examples)]  # right are A, B, C, … in turn
    before = "".join(f"{each.with_letters()} {ascii_uppercase[each.answer]}\n\n" for each in shown)
    both = [*asked, *turned]
    prompts = [before + question.with_letters() for question in both]
    options = [len(question.options) for question in both]
    chosen = _likeliest_letters(model, tokenizer, prompts, options, settings.batch_size)
    progress(1, 3)
    written = _written_letters(model, tokenizer, prompts, options, settings.batch_size)
    progress(2, 3)
    cloze_examples = "".join(f"{each.without_options()} {each.options[each.answer]}\n\n" for each in examples)
    cloze = _cloze_answers(model, tokenizer, asked, cloze_examples, settings.batch_size)
    rows = []
    for index, (one, other) in enumerate(zip(asked, turned, strict=True)):
        first, second = chosen[index], chosen[len(asked) + index]
        answers = (written[index], written[len(asked) + index])
        rows.append(
            (
                1,
                1 / len(one.options),
                ((first == one.answer) + (second == other.answer)) / 2,
                cloze[index] == one.answer,
                ((answers[0] == one.answer) + (answers[1] == other.answer)) / 2,
                one.options[first] == other.options[second],
                sum(answer is None for answer in answers) / 2,
            )
        )
    names = (
        "questions",
        "chance",
        "letter_accuracy",
        "cloze_accuracy",
        "generated_accuracy",
        "same_answer",
        "unparsed",
    )
    sums = dict(zip(names, torch.tensor(rows, dtype=torch.float64).unbind(-1), strict=True))
    return {"questions": len(asked), **with_errors(_shares, sums)}


def _shares(sums: Named) -> Named:
    return {name: each / sums["questions"] for name, each in sums.items() if name != "questions"}


def _likeliest_letters(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    options: Sequence[int],
    batch_size: int,
) -> list[int]:
    """The index of the likeliest letter after each prompt: of the first token in which the letters differ."""
    rows: list[list[int]] = []
    candidates: list[list[int]] = []
    for prompt, count in zip(prompts, options, strict=True):
        encoded = encode_texts(tokenizer, [f"{prompt} {letter}" for letter in ascii_uppercase[:count]])
        columns = list(zip(*encoded, strict=False))
        common = next(index for index, column in enumerate(columns) if len(set(column)) > 1)
        rows.append(encoded[0][:common])
        candidates.append(list(columns[common]))
    found = [0] * len(rows)
    for batch in batches_by_length(rows, batch_size):
        input_ids, mask = left_padded([rows[index] for index in batch], next(model.parameters()).device)
        logits, _ = prefill(model, input_ids, input_ids.shape[1], mask)
        check_numbers(logits)
        for index, row in zip(batch, logits, strict=True):
            found[index] = int(row[candidates[index]].argmax())
    return found


def _written_letters(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    options: Sequence[int],
    batch_size: int,
) -> list[int | None]:
    """The index of the letter that the greedy continuation of each prompt begins with."""
    rows, ends = encode_texts(tokenizer, prompts), end_tokens(model)
    found: list[int | None] = [None] * len(rows)
    for batch in batches_by_length(rows, batch_size):
        input_ids, mask = left_padded([rows[index] for index in batch], next(model.parameters()).device)
        logits, cache = prefill(model, input_ids, input_ids.shape[1], mask)
        steps = [tokens.tolist() for tokens in decode_greedily(model, logits, cache, mask, at_most=ANSWER_TOKENS)]
        for index, tokens in zip(batch, zip(*steps, strict=True), strict=True):
            end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
            text = tokenizer.decode(list(tokens[:end]), skip_special_tokens=True)
            found[index] = parse_letter(text, ascii_uppercase[: options[index]])
    return found


def _cloze_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    before: str,
    batch_size: int,
) -> list[int]:
    """The index of the option with the largest log-likelihood per character, after the question alone."""
    contexts: list[list[int]] = []
    continuations: list[list[int]] = []
    for question in questions:
        prompt = before + question.without_options()
        context, *whole = encode_texts(tokenizer, [prompt, *(f"{prompt} {option}" for option in question.options)])
        contexts += [context] * len(whole)
        continuations += [each[len(context) :] for each in whole]
    likely = iter(log_probability(model, contexts, continuations, batch_size=batch_size))
    found = []
    for question in questions:
        scores = [next(likely) / len(option) for option in question.options]
        found.append(scores.index(max(scores)))
    return found
