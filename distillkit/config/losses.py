"""`loss_functions`: what is minimised, a weighted mean of the losses in this list."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from distillkit.config.errors import KeyProblem, one_of
from distillkit.config.section import Section

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
"""Each loss of this package, and the keys beside its weight that it takes."""

LOSS_NAMES = tuple(_OPTIONS)

_FROM_A_MODULE = "module:function"
_OPTIONS_FROM_A_MODULE = ("options", "sparse_chunk_length")
_PATTERN = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"

HIDDEN_STATE_FUNCTIONS = ("hs_mse", "hs_cosine")
ATTENTION_FUNCTIONS = ("attn_mse", "attn_cosine")
"""Layer by layer: the output of the student's attention against that of the teacher's, on the teacher's input."""

_TAKEN = (*LOSS_NAMES, "loss", "grad_norm", "learning_rate", "epoch", "step", "tokens", "tokens_per_second")
"""Names that metrics have already."""


def _check_function(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(_PATTERN, value):
        name = value.rpartition(":")[2]
        if name in _TAKEN:
            raise KeyProblem("", f"{name} is a name in the metrics already; give the function another name")
    elif value not in LOSS_NAMES:
        raise KeyProblem("", one_of(value, [*LOSS_NAMES, _FROM_A_MODULE]))
    return str(value)


LossFunctionName = Annotated[
    str,
    BeforeValidator(_check_function),
    WithJsonSchema({"anyOf": [{"enum": [*LOSS_NAMES]}, {"type": "string", "pattern": f"^{_PATTERN}$"}]}),
]


class LossConfig(Section):
    """One loss, its weight, and the options that it has."""

    function: LossFunctionName = Field(
        description="cross_entropy, kl, hs_cosine, attn_mse, ...; or module:function, a loss of your own: a Python "
        "function in a module of the working directory or an installed one"
    )
    weight: float = Field(ge=0, description="share of the loss; weights are divided by their sum")
    temperature: float | None = Field(
        None, gt=0, description="divides the logits of both models; divergences only, 1 by default"
    )
    missing_probability_handling: Literal["zero", "symmetric_uniform", "background"] | None = Field(
        None,
        description="the probability, under a sparse teacher, of tokens that are not among its k. zero (default): "
        "none; symmetric_uniform: the rest, evenly; background: the rest, as in a stored distribution (kl only)",
    )
    sparse_chunk_length: int | None = Field(
        None, gt=0, description="tokens per chunk of logits; by default as many as a memory budget allows"
    )
    margin: float | None = Field(
        None, ge=0, description="hinge only: how far apart pairs must be; the teacher's own gaps by default"
    )
    top_k: int | None = Field(
        None, gt=1, description="ranking losses with a dense teacher: how many of its tokens are ranked"
    )
    options: dict[str, Any] | None = Field(
        None, description="module:function only: keyword arguments that the function is called with"
    )

    @property
    def name(self) -> str:
        """The name in metrics, results and reports."""
        return self.function.rpartition(":")[2]

    @property
    def is_from_module(self) -> bool:
        return ":" in self.function

    @model_validator(mode="after")
    def check_options(self) -> Self:
        takes = _OPTIONS.get(self.function, _OPTIONS_FROM_A_MODULE)
        for option in self.model_fields_set - {"function", "weight", *takes}:
            if getattr(self, option) is not None:
                having = [name for name, options in _OPTIONS.items() if option in options] or [_FROM_A_MODULE]
                raise KeyProblem(option, f"{self.function} has none (only {', '.join(having)}); remove it")
        if self.missing_probability_handling == "background" and self.function != "kl":
            raise KeyProblem("missing_probability_handling", f"background is for kl only, not for {self.function}")
        return self


def align_attention_alone(losses: Sequence[LossConfig]) -> bool:
    """Whether only the student's attention is computed, and nothing else of the student."""
    return all(loss.function in ATTENTION_FUNCTIONS for loss in losses)
