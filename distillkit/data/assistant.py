"""Which tokens of a conversation the assistant says: what `dataset.assistant_only_loss` lets count.

A chat template tells it by {% generation %} marks; for many models whose template has none, TRL has one with marks. Of
any other template the text is compared turn by turn: what a turn of the assistant adds to the text before it, behind
what prompts the model for it, is what the assistant says. The token that ends its turn is part of that, since the
model must learn to stop; white space behind that token, which the model never has to write, is not.
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
"""From messages, and options of the chat template (`tools` among them), to token ids and which the assistant says."""

_QUESTION = [{"role": "user", "content": "?"}]


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template to use: the tokenizer's own (None), or one of TRL's that does the same and has marks."""
    if has_generation_markers(tokenizer.chat_template):
        return None
    try:
        template: str | None = get_training_chat_template(tokenizer)
    except ValueError:  # TRL knows no other
        return None
    return template


def assistant_encoder(tokenizer: PreTrainedTokenizerBase, template: str | None) -> Encoder:
    """Encodes conversations with `template`, or the tokenizer's own; says which tokens the assistant says.

    The encoder raises UserError for a template that does not tell, and what the template itself raises.
    """

    def by_marks(messages: Messages, options: dict[str, Any]) -> tuple[list[int], list[bool]]:
        encoded = tokenizer.apply_chat_template(
            messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True, **options
        )
        return encoded["input_ids"], [bool(said) for said in encoded["assistant_masks"]]

    def by_turns(messages: Messages, options: dict[str, Any]) -> tuple[list[int], list[bool]]:
        def render(turns: Messages, **more: Any) -> str:
            text: str = tokenizer.apply_chat_template(turns, tokenize=False, **options, **more)
            return text

        text, spans = _spans_by_turns(messages, render, tuple(tokenizer.get_added_vocab()))
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        places = encoded["offset_mapping"]
        said = [any(first < stop and start < end for first, end in spans) for start, stop in places]
        return encoded["input_ids"], said

    if not has_generation_markers(tokenizer.chat_template if template is None else template):
        return by_turns
    if not is_chat_template_stop_token_trained(tokenizer, chat_template=template):
        logger.warning(
            "dataset.assistant_only_loss: by the marks of the chat template, the token that ends a turn is not the "
            "assistant's; the student may not learn to stop"
        )
    return by_marks


def _spans_by_turns(
    messages: Messages, render: Callable[..., str], special_tokens: tuple[str, ...]
) -> tuple[str, list[tuple[int, int]]]:
    """The whole text, and where in it (first character, end) the assistant speaks."""
    whole = render(messages)
    prompt = _header(render)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:turn]) if turn else ""
        through = render(messages[: turn + 1])
        # Before a first turn there may be a system prompt that the template brings itself.
        start = through.find(prompt, len(before))
        if (
            not whole.startswith(through)
            or not through.startswith(before)
            or start < 0
            or (turn and start > len(before))
        ):
            raise UserError(
                "dataset.assistant_only_loss",
                "the tokenizer's chat template does not tell the assistant's words from "
                "the others; give it a chat template with {% generation %} marks, or remove assistant_only_loss",
            )
        said = through.rstrip()
        spans.append((start + len(prompt), len(said if said.endswith(special_tokens) else through)))
    return whole, spans


def _header(render: Callable[..., str]) -> str:
    """What stands between a question and the assistant's words: what prompts the model for them."""
    question = render(_QUESTION)
    prompt = render(_QUESTION, add_generation_prompt=True).removeprefix(question)
    if prompt:
        return prompt
    # Some templates take no notice of add_generation_prompt: there it is what all answers begin with.
    answers = [render([*_QUESTION, {"role": "assistant", "content": content}]) for content in ("A", "B")]
    return answers[0][: common_prefix_length(*answers)].removeprefix(question)
