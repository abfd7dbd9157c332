"""Which tokens of a conversation are the assistant's: those that count with `dataset.assistant_only_loss`.

A chat template marks them by {% generation %}; for many models whose template has no marks, TRL has one that does. With
any other template the text is compared turn by turn: the assistant's text is what its turn adds to the text before,
after the header that prompts the model. The token that ends the turn belongs to it, because the model must learn to
stop. White space after that token does not: the model never has to write it.
"""

import logging
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)
from trl.data_utils import common_prefix_length

from distillkit.config.errors import UserError

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]
Encoder = Callable[[Messages, dict[str, Any]], tuple[list[int], list[bool]]]
"""From messages and options of the chat template, such as `tools`, to token ids and the mask of the assistant's."""

_QUESTION = [{"role": "user", "content": "?"}]


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template to use: None for the tokenizer's own, or TRL's equivalent with marks."""
    if has_generation_markers(tokenizer.chat_template):
        return None
    try:
        template: str | None = get_training_chat_template(tokenizer)
    except ValueError:  # TRL has no equivalent
        return None
    return template


def assistant_encoder(tokenizer: PreTrainedTokenizerBase, template: str | None) -> Encoder:
    """Encodes conversations with `template`, or the tokenizer's own, and masks the assistant's tokens.

    The encoder raises UserError for a template that does not separate the assistant's turns, and any error of the
    template itself.
    """

    def by_marks(messages: Messages, options: dict[str, Any]) -> tuple[list[int], list[bool]]:
        encoded = tokenizer.apply_chat_template(
            messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True, **options
        )
        return encoded["input_ids"], [bool(mask) for mask in encoded["assistant_masks"]]

    def by_turns(messages: Messages, options: dict[str, Any]) -> tuple[list[int], list[bool]]:
        def render(turns: Messages, **more: Any) -> str:
            text: str = tokenizer.apply_chat_template(turns, tokenize=False, **options, **more)
            return text

        text, spans = _spans_by_turns(messages, render, tuple(tokenizer.get_added_vocab()))
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]
        mask = [any(first < stop and start < end for first, end in spans) for start, stop in offsets]
        return encoded["input_ids"], mask

    if not has_generation_markers(tokenizer.chat_template if template is None else template):
        return by_turns
    if not is_chat_template_stop_token_trained(tokenizer, chat_template=template):
        logger.warning(
            "dataset.assistant_only_loss: the chat template does not mark the end of a turn as the assistant's, "
            "so the student may not learn to stop"
        )
    return by_marks


def _spans_by_turns(
    messages: Messages, render: Callable[..., str], special_tokens: tuple[str, ...]
) -> tuple[str, list[tuple[int, int]]]:
    """The whole text, and the spans (first character, end) of the assistant's text in it."""
    whole = render(messages)
    prompt = _header(render)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:turn]) if turn else ""
        through = render(messages[: turn + 1])
        # Before a first turn the template may insert a system prompt of its own.
        start = through.find(prompt, len(before))
        if (
            not whole.startswith(through)
            or not through.startswith(before)
            or start < 0
            or (turn and start > len(before))
        ):
            raise UserError(
                "dataset.assistant_only_loss",
                "the tokenizer's chat template does not separate the assistant's text from "
                "the rest; give it a chat template with {% generation %} marks, or remove assistant_only_loss",
            )
        stripped = through.rstrip()
        spans.append((start + len(prompt), len(stripped if stripped.endswith(special_tokens) else through)))
    return whole, spans


def _header(render: Callable[..., str]) -> str:
    """The text between a question and the assistant's answer, which prompts the model."""
    question = render(_QUESTION)
    prompt = render(_QUESTION, add_generation_prompt=True).removeprefix(question)
    if prompt:
        return prompt
    # Some templates ignore add_generation_prompt: there the header is the common beginning of all answers.
    answers = [render([*_QUESTION, {"role": "assistant", "content": content}]) for content in ("A", "B")]
    return answers[0][: common_prefix_length(*answers)].removeprefix(question)
