"""`loss_functions`: what is minimised, a weighted mean of the losses named here."""

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from distillkit.config.errors import KeyProblem
from distillkit.config.section import Section

LossName = Literal[
    "cross_entropy",
    "kl",
    "reverse_kl",
    "jsd",
    "tvd",
    "hinge",
    "logistic_ranking",
    "hs_mse",
    "hs_cosine",
    "attn_mse",
    "attn_cosine",
]
HIDDEN_STATE_FUNCTIONS = ("hs_mse", "hs_cosine")
ATTENTION_FUNCTIONS = ("attn_mse", "attn_cosine")
"""Layer by layer: the student's attention, on what the teacher's is given, against what the teacher's returns."""

_DIVERGENCE = ("temperature", "missing_probability_handling", "sparse_chunk_length")
_OPTIONS: dict[str, tuple[str, ...]] = {
    "cross_entropy": ("sparse_chunk_length",),
    "kl": _DIVERGENCE,
    "reverse_kl": _DIVERGENCE,
    "jsd": _DIVERGENCE,
    "tvd": _DIVERGENCE,
    "hinge": ("margin", "top_k", "sparse_chunk_length"),
    "logistic_ranking": ("top_k", "sparse_chunk_length"),
    "hs_mse": (),
    "hs_cosine": (),
    "attn_mse": (),
    "attn_cosine": (),
}


class LossConfig(Section):
    """One loss, its weight, and the options that it has."""

    function: LossName = Field(description="name of the loss: cross_entropy, kl, hs_cosine, attn_mse, ...")
    weight: float = Field(ge=0, description="share of the loss; weights are divided by their sum")
    temperature: float | None = Field(
        None, gt=0, description="divides the logits of both models; divergences only, 1 by default"
    )
    missing_probability_handling: Literal["zero", "symmetric_uniform", "background"] | None = Field(
        None,
        description="what a sparse teacher says of tokens it does not list. zero (default): nothing; "
        "symmetric_uniform: the rest, evenly; background: the rest, as a stored distribution has it (kl only)",
    )
    sparse_chunk_length: int | None = Field(
        None, gt=0, description="tokens worked on at a time; by default as many as a memory budget allows"
    )
    margin: float | None = Field(
        None, ge=0, description="hinge only: how far apart pairs must be; the teacher's own gaps by default"
    )
    top_k: int | None = Field(
        None, gt=1, description="ranking losses with a dense teacher: how many of its tokens are ranked"
    )

    @model_validator(mode="after")
    def check_options(self) -> Self:
        for option in self.model_fields_set - {"function", "weight", *_OPTIONS[self.function]}:
            if getattr(self, option) is not None:
                having = [name for name, options in _OPTIONS.items() if option in options]
                raise KeyProblem(option, f"{self.function} has none (only {', '.join(having)}); remove it")
        if self.missing_probability_handling == "background" and self.function != "kl":
            raise KeyProblem("missing_probability_handling", f"background is for kl only, not for {self.function}")
        return self


def align_attention_alone(losses: Sequence[LossConfig]) -> bool:
    """Whether nothing of the student runs but its attention."""
    return all(loss.function in ATTENTION_FUNCTIONS for loss in losses)
