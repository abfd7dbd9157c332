"""Which layers of the student keep full attention, and which get another mixer.

A layout is a rule for any number of layers. The three named ones are those compared in the write-up of
AFM-4.5B's conversion: three KDA layers to one full layer (`hybrid`), as many full layers with the first four
of them in front (`front_loaded`), and no full attention at all (`kda_only`).
"""

from distillkit.config import StudentConfig, UserError
from distillkit.student.mixers.names import FULL

HYBRID_PERIOD = 4
FRONT_LAYERS = 4


def layer_mixers(num_layers: int, student: StudentConfig) -> list[str]:
    """The mixer of each of the student's layers: `full`, or `student.mixer`.

    Raises UserError for a layer of `full_attention_layers` that the teacher does not have.
    """
    if student.layout == "hybrid":
        full = _hybrid(num_layers)
    elif student.layout == "front_loaded":
        full = _front_loaded(num_layers)
    else:
        full = _existing(student.full_attention_layers or [], num_layers)
    return [FULL if index in full else student.mixer for index in range(num_layers)]


def _hybrid(num_layers: int) -> list[int]:
    """The last layer of each complete group of four: 3, 7, 11, …"""
    return list(range(HYBRID_PERIOD - 1, num_layers, HYBRID_PERIOD))


def _front_loaded(num_layers: int) -> list[int]:
    """As many layers as the hybrid has: the first four, and the last of each of equal parts of the rest."""
    total = len(_hybrid(num_layers))
    front = min(FRONT_LAYERS, total)
    spread = total - front
    rest = num_layers - front
    return list(range(front)) + [front + (part + 1) * rest // spread - 1 for part in range(spread)]


def _existing(layers: list[int], num_layers: int) -> list[int]:
    for position, layer in enumerate(layers):
        if layer >= num_layers:
            raise UserError(
                f"student.full_attention_layers[{position}]",
                f"layer {layer} does not exist, the teacher's layers are 0 to {num_layers - 1}",
            )
    return layers
