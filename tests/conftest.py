"""Tests marked `gpu` are skipped where there is no CUDA device, and where there is one no kernel is tuned for them.

What takes time in every run and is the same in each is done once in a process: pictures of reports. None waits for the
disk, for no test cuts the power.
"""

import gc
import os
from collections.abc import Iterator
from functools import cache

import pytest

os.fsync = lambda descriptor: None  # processes that tests fork and run do not have it


def pytest_collection_finish() -> None:
    """What was imported is there to stay, and is not looked through each time that a run collects garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def kept_from_the_collector() -> Iterator[None]:
    """Nor is what tests imported and hold for others, such as the compiler: to look it through takes 0.1 s and more."""
    yield
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def pictures_drawn_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "reporting" in request.path.parts or request.path.name == "test_results.py":
        return
    from distillkit.reporting import training_section
    from tests.pictures import drawn_once

    monkeypatch.setattr(training_section, "line_chart", drawn_once)


@pytest.fixture(autouse=True)
def untuned(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu"):
        keep_one_configuration_of_each_kernel()


@cache
def keep_one_configuration_of_each_kernel() -> None:
    """That of flash-linear-attention's with four warps and few stages; all compute the same.

    To try them out takes minutes for every shape and dtype: some need a minute to compile. The shared memory of an A100
    or H100 holds what these need, in float32, too.
    """
    from distillkit.student.network.kda_attention import FLA_AVAILABLE

    if not FLA_AVAILABLE:
        return
    import fla.layers  # noqa: F401 — its kernels are among them

    gc.unfreeze()
    from triton.runtime.autotuner import Autotuner

    for tuner in gc.get_objects():
        if issubclass(type(tuner), Autotuner):
            tuner.configs = [min(tuner.configs, key=lambda each: (abs(each.num_warps - 4), each.num_stages))]


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Byte-level tokenizer of 300 tokens with EOS, padding and a chat template. Do not change it: it is shared."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["the theory of relativity states that", "time is relative"] * 50, 300, 2, False, special)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>", chat_template=CHATML
    )
