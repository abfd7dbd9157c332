"""Context parallelism: rows divided over processes (`parallel.context`), so that each holds a part of their tokens.

Models are told once (`divide_rows_of`); of each batch a process keeps its part (`Context.part_of`), and all that is
computed for single tokens, the losses too, stays where these are. What mixes tokens exchanges heads for tokens
(`models.divided_rows`). The processes of a group read the same rows; for gradients they are processes like any others.
"""

from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel, TrainingArguments

from distillkit.config import UserError
from distillkit.config.parallel import ParallelConfig
from distillkit.models.divided_rows import DIVIDED, Context, set_divided_rows
from distillkit.student.mixers.registry import mixed_layers

ATTENTION_TYPES = {"full_attention", "sliding_attention", "linear_attention"}


def context_of(parallel: ParallelConfig | None, arguments: TrainingArguments) -> Context | None:
    """The groups of processes that `parallel.context` describes; None where rows are whole."""
    set_divided_rows(None)
    if parallel is None or parallel.context == 1:
        return None
    parallel.sizes(arguments.world_size)
    shape = (arguments.world_size // parallel.context, parallel.context)
    return Context(init_device_mesh(arguments.device.type, shape, mesh_dim_names=("dp_shard", "cp")))


def divide_rows_of(model: PreTrainedModel, key: str) -> None:
    """Let a model take parts of rows. Raises `UserError`, with the model's `key`, for one that cannot."""
    implementation, name = model.config._attn_implementation, type(model).__name__
    types = set(getattr(model.config, "layer_types", None) or []) - ATTENTION_TYPES
    if implementation != "sdpa" or not model._supports_flash_attn or types:
        what = f"its {', '.join(sorted(types))}" if types else f"attention {implementation}"
        raise UserError(key, f"{name} with {what} cannot work on rows that are divided; remove parallel.context")
    for layer, mixer in mixed_layers(model):
        try:
            mixer.divide_rows(layer)
        except NotImplementedError:
            raise UserError(
                key, f"the mixer {type(mixer).__name__} cannot work on rows that are divided; remove parallel.context"
            ) from None
    model.set_attn_implementation(DIVIDED)
