"""The formats of captured teacher outputs: the two published ones, and plain columns.

A `teacher` of kind `dataset` needs the format that its outputs were captured with.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from distillkit.config.errors import KeyProblem, shown
from distillkit.config.section import Section

FloatType = Literal["float16", "bfloat16", "float32", "float64"]

_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895e38, "float32": 3.4028e38, "float64": 1.7976e308}
_HIGHEST_POWER = 64
_REMEDY = "set normalize_t: true, fewer terms or a wider term_dtype"


def _check_term(term: Any) -> Any:
    power = isinstance(term, int) and not isinstance(term, bool) and 0 <= term <= _HIGHEST_POWER
    if power or term in ("sqrt", "exp"):
        return term
    raise ValueError(f"must be a power from 0 to {_HIGHEST_POWER}, 'sqrt' or 'exp', got {shown(term)}")


def _fits(term: int | str, t: int, dtype: str) -> bool:
    """Whether a term at its largest argument is a number of the type."""
    try:
        if term == "exp":
            return math.exp(t) <= _LARGEST[dtype]
        return t ** (0.5 if isinstance(term, str) else term) <= _LARGEST[dtype]
    except OverflowError:
        return False


class ResidualBin(Section):
    """Quantised differences between log-probabilities and the polynomial."""

    scale_dtype: FloatType = Field(description="type of the bin's scale")
    element_bits: int = Field(gt=0, le=64, description="bits per element, 1 to 64")
    num_elements: int = Field(gt=0, description="how many elements the bin holds")


class LogprobCompressorConfig(Section):
    """`logprob_compressor`: exact head, polynomial tail, quantised residuals, packed ids."""

    d: int = Field(gt=1, description="size of the teacher's vocabulary")
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
        elements = sum(each.num_elements for each in self.residual_bins)
        if not self.polynomial_terms and elements < approximated:
            left = approximated - elements
            raise KeyProblem("polynomial_terms", f"give terms (or residual_bins) for the {left} inexact values")
        if elements > approximated:
            raise KeyProblem("residual_bins", f"hold {elements} elements, but k - exact_k = {approximated}")
        last = 1 if self.normalize_t else max(approximated - 1, 0)
        for term in self.polynomial_terms or []:
            if not _fits(term, last, self.term_dtype):
                raise KeyProblem("polynomial_terms", f"{term} at t = {last} overflows {self.term_dtype}; {_REMEDY}")
        return self


class LegacyLogitCompressionConfig(Section):
    """`legacy_logit_compression`: exact head and one polynomial for the rest."""

    vocab_size: int = Field(gt=1, description="size of the teacher's vocabulary")
    k: int = Field(gt=0, description="log-probabilities per token, exact and approximated")
    exact_k: int = Field(ge=0, description="how many of them are stored as floating point numbers")
    polynomial_degree: int = Field(ge=0, le=_HIGHEST_POWER, description="degree of the polynomial for the others")
    with_sqrt_term: bool = Field(False, description="the polynomial has a square root term")
    term_dtype: FloatType = Field("float32", description="type of the polynomial's coefficients")
    invert_polynomial: bool = Field(True, description="fit in 1/t instead of t")

    @model_validator(mode="after")
    def check_sizes(self) -> Self:
        if self.exact_k > self.k:
            raise KeyProblem("exact_k", f"must be <= k = {self.k}, got {self.exact_k}")
        if self.k > self.vocab_size:
            raise KeyProblem("k", f"must be <= vocab_size = {self.vocab_size}, got {self.k}")
        approximated = self.k - self.exact_k
        degree = 0 if self.invert_polynomial else self.polynomial_degree
        if not _fits(degree, approximated, self.term_dtype):
            raise KeyProblem(
                "polynomial_degree",
                f"{approximated} to the power of {degree} overflows {self.term_dtype}; "
                "set invert_polynomial: true, a lower degree or a wider term_dtype",
            )
        return self


class PlainConfig(Section):
    """`plain`: the k likeliest tokens and their log-probabilities, uncompressed."""

    k: int = Field(gt=0, description="log-probabilities per token")
    vocab_size: int = Field(gt=1, description="size of the teacher's vocabulary")
    dtype: Literal["float16", "float32"] = Field("float32", description="type of the log-probabilities")

    @model_validator(mode="after")
    def check_sizes(self) -> Self:
        if self.k > self.vocab_size:
            raise KeyProblem("k", f"must be <= vocab_size = {self.vocab_size}, got {self.k}")
        return self
