"""What a configuration makes of a student and its teacher: the objective, and the request to the teacher.

A run, the simulation of its step in a plan, and benchmarks of single steps are wired alike because it is done here.
"""

from transformers import PreTrainedModel

from distillkit.config import RunConfig
from distillkit.config.losses import ATTENTION_FUNCTIONS
from distillkit.losses import ModelShape, Objective
from distillkit.models.attention import trained_attention
from distillkit.teacher import SignalRequest, Teacher


def objective_of(
    config: RunConfig,
    student: PreTrainedModel,
    teacher: Teacher,
    vocabulary_size: int,
    chunk_tokens: int | None = None,
) -> Objective:
    """The objective of a run.

    student: frozen as it trains. vocabulary_size: tokens that both models know. chunk_tokens: as for `Objective`.
    """
    return Objective(
        config.loss_functions,
        config.layer_mapping,
        _shape(student),
        None if teacher.model is None else _shape(teacher.model),
        force_hidden_state_projection=config.force_hidden_state_projection,
        vocabulary_size=vocabulary_size,
        chunk_tokens=chunk_tokens,
        attention_layers=_attention_layers(config, student),
    )


def signal_request(
    objective: Objective, *, top_k: int | None = None, vocabulary_size: int | None = None
) -> SignalRequest:
    """What the objective needs of the teacher for each batch; `top_k` and `vocabulary_size` as for `SignalRequest`."""
    return SignalRequest(
        hidden_states=tuple(objective.teacher_layers),
        final_norm=objective.taps_final_norm,
        attention=tuple(objective.attention_layers),
        top_k=top_k,
        vocabulary_size=vocabulary_size,
    )


def _shape(model: PreTrainedModel) -> ModelShape:
    return ModelShape(model.config.hidden_size, model.config.num_hidden_layers)


def _attention_layers(config: RunConfig, student: PreTrainedModel) -> list[int]:
    """Layers whose attention outputs are compared: all whose attention is trained, where a loss compares any."""
    if not any(loss.function in ATTENTION_FUNCTIONS for loss in config.loss_functions):
        return []
    return list(trained_attention(student))
