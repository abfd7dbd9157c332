"""Which layers of student and teacher losses compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from distillkit.config import LossConfig, UserError
from distillkit.config.losses import ATTENTION_FUNCTIONS


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that decide how hidden states and layers are paired."""

    hidden_size: int
    num_layers: int


def layer_pairs(
    layer_mapping: Literal["all"] | Sequence[tuple[int, int]], student_layers: int, teacher_layers: int
) -> list[tuple[int, int]]:
    """Pairs of indices as transformers counts hidden states; `all` is every decoder layer's output.

    Raises `UserError` for models of different depth, and for an index that does not exist.
    """
    if layer_mapping == "all":
        if student_layers != teacher_layers:
            raise UserError(
                "layer_mapping",
                f"all needs models of equal depth; the student has {student_layers} layers, the teacher "
                f"{teacher_layers}: give pairs [student index, teacher index]",
            )
        return [(layer, layer) for layer in range(1, student_layers + 1)]
    pairs = [(int(student), int(teacher)) for student, teacher in layer_mapping]
    for position, pair in enumerate(pairs):
        for owner, index, layers in zip(("student", "teacher"), pair, (student_layers, teacher_layers), strict=True):
            if not 0 <= index <= layers:
                raise UserError(
                    f"layer_mapping[{position}]",
                    f"the {owner} has no hidden state {index}; "
                    f"0 (embeddings) to {layers} (output of its last layer) exist",
                )
    return pairs


def check_attention(
    loss_functions: Sequence[LossConfig],
    layers: Sequence[int],
    student: ModelShape | None,
    teacher: ModelShape | None,
) -> None:
    """Raises `UserError` where layer i of the student cannot be compared with layer i of the teacher."""
    position = next(i for i, loss in enumerate(loss_functions) if loss.function in ATTENTION_FUNCTIONS)
    key, function = f"loss_functions[{position}].function", loss_functions[position].function
    if student is None or teacher is None or student != teacher:
        raise UserError(
            key,
            f"{function} compares layer by layer, which needs models of equal depth and width; the student has "
            f"{_described(student)}, the teacher {_described(teacher)}; use hs_mse or hs_cosine with a layer_mapping",
        )
    if not layers:
        raise UserError(
            key,
            f"{function} has nothing to train: all of the student's attention is frozen; see frozen_res and "
            "frozen_modules",
        )


def _described(shape: ModelShape | None) -> str:
    return "no layers" if shape is None else f"{shape.num_layers} layers of width {shape.hidden_size}"
