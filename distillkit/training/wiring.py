"""What a configuration makes of a student and its teacher: the objective, and the teacher as one who can be asked.

A run, the rehearsal of its step in a plan, and benchmarks of single steps are wired alike because it is done here.
"""

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from distillkit.config import RunConfig
from distillkit.config.losses import ATTENTION_FUNCTIONS
from distillkit.losses import ModelShape, Objective
from distillkit.models.attention import trained_attention
from distillkit.teacher.live import LiveTeacher


def objective_of(
    config: RunConfig,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    vocabulary_size: int,
    chunk_tokens: int | None = None,
) -> Objective:
    """The objective of a run.

    student: frozen as it trains. teacher: None where it is captured, and has no layers to compare with.
    vocabulary_size: tokens that both models know. chunk_tokens: as for `Objective`.
    """
    return Objective(
        config.loss_functions,
        config.layer_mapping,
        _shape(student),
        None if teacher is None else _shape(teacher),
        force_hidden_state_projection=config.force_hidden_state_projection,
        vocabulary_size=vocabulary_size,
        chunk_tokens=chunk_tokens,
        attention_layers=_attention_layers(config, student),
    )


def online_teacher(
    config: RunConfig,
    teacher: PreTrainedModel,
    objective: Objective,
    vocabulary_size: int,
    background: Float[Tensor, " vocab"] | None = None,
) -> LiveTeacher:
    """A live teacher who says what the objective asks for. background: as for `LiveTeacher`."""
    assert config.teacher.kind == "hf"
    return LiveTeacher(
        teacher,
        objective.teacher_layers,
        final_norm=objective.taps_final_norm,
        top_k=config.teacher.top_k,
        vocabulary_size=vocabulary_size,
        background=background,
        attention_layers=objective.attention_layers,
    )


def _shape(model: PreTrainedModel) -> ModelShape:
    return ModelShape(model.config.hidden_size, model.config.num_hidden_layers)


def _attention_layers(config: RunConfig, student: PreTrainedModel) -> list[int]:
    """Layers whose attention outputs are compared: all whose attention is trained, where a loss compares any."""
    if not any(loss.function in ATTENTION_FUNCTIONS for loss in config.loss_functions):
        return []
    return list(trained_attention(student))
