"""Continuations of prompts by a student."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from distillkit.config.errors import UserError
from distillkit.evaluation.generation import GENERATED_CAPACITY
from distillkit.models.special_tokens import encode_texts

GRAPHS_PAY = 1500
"""Tokens that take longer, step by step, than it takes to compile a step."""


@dataclass(frozen=True)
class Sample:
    """A prompt and the student's continuation, as text."""

    prompt: str
    continuation: str


def check_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> None:
    """Raises `UserError` for a prompt without a token: nothing can continue it."""
    for index, ids in enumerate(encode_texts(tokenizer, prompts)):
        if not ids:
            raise UserError(
                f"evaluation.prompts[{index}]", f"{prompts[index]!r} becomes no token; give some text, or remove it"
            )


@torch.no_grad()
def generate_samples(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
) -> list[Sample]:
    """One continuation of each prompt, the same for the same seed; temperature 0 always takes the likeliest token.

    The caller's random number generators are not changed.
    """
    device = next(student.parameters()).device
    divided = any(isinstance(parameter, DTensor) for parameter in student.parameters())
    as_graphs = device.type == "cuda" and not divided and len(prompts) * max_new_tokens >= GRAPHS_PAY
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **({"cache_implementation": "static", "max_cache_len": GENERATED_CAPACITY} if as_graphs else {}),
        **({"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}),
    )
    training = student.training
    student.eval()
    samples = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for prompt in prompts:
            torch.manual_seed(seed)
            input_ids = torch.tensor(encode_texts(tokenizer, [prompt]), device=device)
            output = student.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=settings)
            written = output[0, input_ids.shape[1] :]
            samples.append(Sample(prompt, tokenizer.decode(written, skip_special_tokens=True)))
    student.train(training)
    vars(student).pop("_compiled_call", None)  # of transformers; its graphs keep memory
    return samples
