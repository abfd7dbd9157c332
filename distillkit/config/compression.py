"""The two published formats for captured teacher outputs, as a `teacher` of kind `dataset` names them.

The configuration must be the one the outputs were captured with.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from distillkit.config.errors import KeyProblem, shown
from distillkit.config.section import Section

FloatType = Literal["float16", "bfloat16", "float32", "float64"]


def _check_term(term: Any) -> Any:
    if term in ("sqrt", "exp") or (isinstance(term, int) and not isinstance(term, bool) and term >= 0):
        return term
    raise ValueError(f"must be a power (0, 1, 2, ...), 'sqrt' or 'exp', got {shown(term)}")


class ResidualBin(Section):
    """Quantised differences between log-probabilities and the polynomial."""

    scale_dtype: FloatType = Field(description="type of the bin's scale")
    element_bits: int = Field(gt=0, le=64, description="bits per element, 1 to 64")
    num_elements: int = Field(gt=0, description="how many elements the bin holds")


class LogprobCompressorConfig(Section):
    """`logprob_compressor`: exact head, polynomial tail, quantised residuals, packed ids."""

    d: int = Field(gt=0, description="size of the teacher's vocabulary")
    k: int = Field(gt=0, description="log-probabilities per token, exact and approximated")
    exact_k: int = Field(ge=0, description="how many of them are stored as floating point numbers")
    exact_dtype: FloatType = Field("float32", description="type of the exact ones")
    polynomial_terms: list[Annotated[int | Literal["sqrt", "exp"], BeforeValidator(_check_term)]] | None = Field(
        None, description="terms of the polynomial for the others: powers, 'sqrt', 'exp'"
    )
    term_dtype: FloatType = Field("float32", description="type of the polynomial's coefficients")
    residual_bins: list[ResidualBin] = Field(default=[], description="bins of quantised residuals")
    delta_encoding: bool = Field(True, description="store differences between neighbours")
    error_diffusion: bool = Field(False, description="carry each quantisation error over to the next element")
    normalize_t: bool = Field(False, description="the polynomial's argument runs from 0 to 1 instead of 0 to k")

    @model_validator(mode="after")
    def check_sizes(self) -> Self:
        if self.exact_k > self.k:
            raise KeyProblem("exact_k", f"must be <= k = {self.k}, got {self.exact_k}")
        if self.k > self.d:
            raise KeyProblem("k", f"must be <= d = {self.d}, got {self.k}")
        approximated = self.k - self.exact_k
        if approximated and not self.polynomial_terms and not self.residual_bins:
            raise KeyProblem("polynomial_terms", f"give terms (or residual_bins) for the {approximated} inexact values")
        elements = sum(each.num_elements for each in self.residual_bins)
        if elements > approximated:
            raise KeyProblem("residual_bins", f"hold {elements} elements, but k - exact_k = {approximated}")
        return self


class LegacyLogitCompressionConfig(Section):
    """`legacy_logit_compression`: exact head and one polynomial for the rest."""

    vocab_size: int = Field(gt=0, description="size of the teacher's vocabulary")
    k: int = Field(gt=0, description="log-probabilities per token, exact and approximated")
    exact_k: int = Field(ge=0, description="how many of them are stored as floating point numbers")
    polynomial_degree: int = Field(ge=0, description="degree of the polynomial for the others")
    with_sqrt_term: bool = Field(False, description="the polynomial has a square root term")
    term_dtype: FloatType = Field("float32", description="type of the polynomial's coefficients")
    invert_polynomial: bool = Field(True, description="fit in 1/t instead of t")

    @model_validator(mode="after")
    def check_sizes(self) -> Self:
        if self.exact_k > self.k:
            raise KeyProblem("exact_k", f"must be <= k = {self.k}, got {self.exact_k}")
        return self
