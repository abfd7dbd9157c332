"""The curve through the log-probabilities that are not stored one by one: Σ cᵢ · termᵢ(t).

The points t are the same for every token. So fitting is a product with one fixed matrix, and evaluating is a few
multiplications and additions of whole chunks of tokens.

The published encoder fits in float32. Where that is precise enough the same is done here, so that results which depend
on the last digits (which way a residual is rounded) are the same. Powers up to t⁴ at a hundred points need more than
float32: that fit misses the values by several nats, differently on each machine and number of threads. There the fit is
done in float64; the same decoder reads its coefficients.
"""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

Term = int | str


class _Constant:
    """A tensor that is copied to a device once: each copy would wait until the device has finished its work."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        if device not in self._copies:
            self._copies[device] = self.tensor.to(device)
        return self._copies[device]


class Curve:
    """A sum of terms at fixed points.

    Args:
        terms: the value of each term at each point [terms, points], computed in the dtype that it is given.
        dtype: the type in which coefficients are stored.
        read: the terms as the decoder multiplies them; by default computed in `dtype`.
    """

    def __init__(
        self,
        terms: Callable[[torch.dtype], Tensor],
        dtype: torch.dtype,
        read: Float[Tensor, "terms points"] | None = None,
    ) -> None:
        self.dtype = dtype
        self._read = _Constant(terms(dtype) if read is None else read)
        self._written = _Constant(terms(torch.promote_types(dtype, torch.float32)).to(dtype))
        self._single, exact = _least_squares(terms(torch.float32), terms(torch.float64))
        self._double = _Constant(exact)
        # No product of coefficient and term, nor their sum, leaves the type.
        values = terms(torch.float64).abs()
        largest = values.amax(1).clamp(min=1) if values.numel() else torch.ones(len(values)).double()
        self._limit = _Constant(torch.finfo(dtype).max / (len(values) * largest))

    def __len__(self) -> int:
        """How many terms."""
        return len(self._limit.tensor)

    def fit(self, values: Float[Tensor, "tokens points"]) -> Float[Tensor, "tokens terms"]:
        """The coefficients of least squared distance to finite values, in the type that stores them."""
        limit = self._limit.on(values.device)
        if self._single is not None and values.is_cpu and values.dtype == torch.float32:
            left, inverse, right = self._single
            with torch.autocast("cpu", enabled=False):
                # A product per token, as in the published encoder: one product of all tokens would round differently.
                coefficients = (right @ (inverse * (left @ values.unsqueeze(-1)))).squeeze(-1).double()
        else:
            coefficients = values.double() @ self._double.on(values.device)
        return torch.clamp(coefficients, -limit, limit).to(self.dtype)

    def residual(
        self, values: Float[Tensor, "tokens points"], coefficients: Float[Tensor, "tokens terms"]
    ) -> Float[Tensor, "tokens points"]:
        """What the curve misses, as the published encoder computes it: terms in float32, rounded afterwards."""
        return values - _sum_of_products(coefficients, self._written.on(coefficients.device))

    def evaluate(self, coefficients: Float[Tensor, "tokens terms"]) -> Float[Tensor, "tokens points"]:
        """The values that the decoder computes from the coefficients."""
        terms = self._read.on(coefficients.device)
        return _sum_of_products(coefficients.to(terms.dtype), terms)


def curve_of(terms: Sequence[Term], points: int, dtype: torch.dtype, *, normalize_t: bool) -> Curve:
    """Terms are powers of t, "sqrt" and "exp"; t runs from 0 to points - 1, or to 1."""

    def values(dtype: torch.dtype) -> Tensor:
        t = torch.linspace(0, 1, points, dtype=dtype) if normalize_t else torch.arange(points, dtype=dtype)
        return torch.stack([t**term if isinstance(term, int) else _FUNCTIONS[term](t) for term in terms])

    return Curve(values, dtype)


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"sqrt": torch.sqrt, "exp": torch.exp}


def _sum_of_products(
    coefficients: Float[Tensor, "tokens terms"], terms: Float[Tensor, "terms points"]
) -> Float[Tensor, "tokens points"]:
    """Σ cᵢ · termᵢ, products and result of the terms' type, sums of at least float32.

    The order of the additions is the published decoder's: where large terms cancel each other, another order changes
    the third decimal. No matrix product is used, because its rounding depends on global settings.
    """
    accumulator = torch.promote_types(terms.dtype, torch.float32)

    def product(index: int) -> Tensor:
        return (coefficients[:, index : index + 1] * terms[index]).to(accumulator)

    def running(indices: Sequence[int]) -> Tensor:
        return reduce(Tensor.add_, map(product, indices[1:]), product(indices[0]))

    return reduce(Tensor.add_, map(running, _partial_sums(len(terms)))).to(terms.dtype)


def _partial_sums(terms: int) -> list[list[int]]:
    """Which terms are added to which: four running sums below 8 terms, else eight after those left over."""
    lanes = 4 if terms < 8 else 8
    full = terms - terms % lanes
    left_over = list(range(full, terms))
    sums = [list(range(lane, full, lanes)) for lane in range(lanes)]
    sums = [sums[0] + left_over, *sums[1:]] if terms < 8 else [left_over, *sums]
    return [each for each in sums if each]


# Singular values up to this count as 0, as in the published encoder.
_CUT = 1e-5
# Largest distance of the float32 fit of a unit vector from the exact one.
_ENOUGH = 1e-3


def _least_squares(
    single: Float[Tensor, "terms points"], double: Float[Tensor, "terms points"]
) -> tuple[tuple[Tensor, Tensor, Tensor] | None, Float[Tensor, "points terms"]]:
    """(the three factors of the pseudo-inverse in float32 where that is enough, the matrix of the chosen fit)."""
    if not double.numel():
        return None, double.T.clone()
    factors = _pseudo_inverse(single)
    exact, published = _product(_pseudo_inverse(double)), _product(factors)
    if torch.linalg.matrix_norm((published - exact) @ double, 2) < _ENOUGH:
        return factors, published
    return None, exact


def _pseudo_inverse(terms: Float[Tensor, "terms points"]) -> tuple[Tensor, Tensor, Tensor]:
    left, singular, right = torch.linalg.svd(terms.T, full_matrices=False)
    return left.T, torch.where(singular > _CUT, 1 / singular, 0).unsqueeze(-1), right.T


def _product(factors: tuple[Tensor, Tensor, Tensor]) -> Float[Tensor, "points terms"]:
    left, inverse, right = (each.double() for each in factors)
    return (right @ (inverse * left)).T
