"""The special tokens around a text: what its tokenizer puts before it once, and behind it only where it ends.

A text may begin with its BOS token already, and some tokenizers append EOS to whatever they read. A second BOS is
nothing that a model was trained on, and a prompt that is closed by EOS cannot be continued.
"""

import copy
from collections.abc import Sequence

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, closed: bool = False) -> list[list[int]]:
    """Token ids of texts, with the special tokens that the tokenizer puts before a text, each once.

    closed: with those that it puts behind a text, too, each once: for a whole document, not for a prompt.
    """
    if not texts:
        return []
    before, behind = special_tokens_around(tokenizer)
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
    begun = [ids if ids[: len(before)] == before else before + ids for ids in encoded]
    if not closed or not behind:
        return begun
    return [ids if ids[-len(behind) :] == behind else ids + behind for ids in begun]


def prompt_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or a copy that closes no text, for code that calls it without further ado."""
    before, behind = special_tokens_around(tokenizer)
    if not behind or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer
    opening = copy.deepcopy(tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(before)
    opening.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*tokens, "$A"], pair=[*tokens, "$A", "$B"], special_tokens=list(zip(tokens, before, strict=True))
    )
    return opening


def special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before a text and behind it."""
    whole, bare = (tokenizer("a", add_special_tokens=each, verbose=False).input_ids for each in (True, False))
    if not bare:  # "a" is no token of it, so only BOS can be distinguished from what comes behind
        begins = whole[:1] == [tokenizer.bos_token_id]
        return whole[:begins], whole[begins:]
    start = next(index for index in range(len(whole)) if whole[index : index + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]
