"""Context parallelism: rows divided over processes (`parallel.context`), so that each holds a part of their tokens.

Models are told once (`divide_rows_of`); of each batch a process keeps its part (`Context.part_of`), and all that is
computed for single tokens, the losses too, stays where these are. What mixes tokens exchanges heads for tokens
(`models.divided_rows`). The processes of a group read the same rows; for gradients they are processes like any others.
"""

import torch
from transformers import PreTrainedModel, TrainingArguments

from distillkit.config import UserError
from distillkit.config.parallel import ParallelConfig
from distillkit.models.divided_rows import DIVIDED, Context, set_divided_rows
from distillkit.student.mixers.registry import mixed_layers
from distillkit.training.parallel import mesh_over

ATTENTION_TYPES = {"full_attention", "sliding_attention"}
MOVING_ROPE = ("dynamic", "longrope")
"""Position embeddings whose frequencies depend on the last position, which a process may not have."""


def context_of(parallel: ParallelConfig | None, arguments: TrainingArguments) -> Context | None:
    """The groups of processes that `parallel.context` describes; None where rows are whole.

    Raises `UserError` for data loading in which the processes of a group may read different rows: each its share, or
    in an order by random numbers that processes of a resumed run do not have in common.
    """
    for key, same in (
        ("train_sampling_strategy", arguments.train_sampling_strategy in ("random", "sequential")),
        ("accelerator_config", arguments.accelerator_config.use_seedable_sampler),
    ):
        if parallel is not None and parallel.context > 1 and not same:
            problem = "does not give the processes that share a row the same rows; remove it or parallel.context"
            raise UserError(f"training_args.{key}", problem)
    return context_among(parallel, arguments.world_size, arguments.device)


def context_among(parallel: ParallelConfig | None, processes: int, device: torch.device) -> Context | None:
    """The same for so many processes, however these read."""
    set_divided_rows(None)
    if parallel is None or parallel.context == 1:
        return None
    parallel.sizes(processes)
    return Context(mesh_over(device, dp_shard=processes // parallel.context, cp=parallel.context))


def divide_rows_of(model: PreTrainedModel, key: str) -> None:
    """Let a model take parts of rows. Raises `UserError`, with the model's `key`, for one that cannot."""
    if (problem := _problem(model)) is not None:
        name = type(model).__name__
        raise UserError(key, f"{name} with {problem} cannot work on rows that are divided; remove parallel.context")
    for layer, mixer in mixed_layers(model):
        if not mixer.divide_rows(layer):
            raise UserError(
                key, f"the mixer {type(mixer).__name__} cannot work on rows that are divided; remove parallel.context"
            )
    model.set_attn_implementation(DIVIDED)


def _problem(model: PreTrainedModel) -> str | None:
    """What of a model would take its part of a row for the whole."""
    decoder = model.get_decoder()
    config, implementation = decoder.config, model.config._attn_implementation
    if implementation != "sdpa" or not model._supports_flash_attn:
        return f"attention {implementation}"
    if not decoder._can_set_attn_implementation():  # transformers would warn, and leave it as it is
        return "attention of its own code"
    mixers = {"linear_attention"} if getattr(config, "mixers", None) else set()  # of which each says what it can
    if types := set(getattr(config, "layer_types", None) or []) - ATTENTION_TYPES - mixers:
        return f"its {', '.join(sorted(types))}"
    scaled = (str(getattr(module, "rope_type", "")) for module in model.modules())  # a name, or one per kind of layer
    moving = next((kind for each in scaled for kind in MOVING_ROPE if kind in each), None)
    return None if moving is None else f"rope_type {moving}"
