"""Elements of the monomial group on one axis, with k independent scale and j independent sign directions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cipm_ir.algebra.action import gather_and_scale, integer_power
from cipm_ir.algebra.validation import (
    FloatArray,
    IntArray,
    SignArray,
    as_exponents,
    as_permutations,
    as_scales,
    as_signs,
)
from cipm_ir.errors import SymmetryError


@dataclass(frozen=True, eq=False, repr=False)
class Element:
    """A monomial element in gather form: `(g·x)[i] = s[i] * x[p[i]]`, with `s` a product over its directions.

    perm: (n,) int64, a permutation of 0..n-1. scale: (k, n) float64, positive and finite. sign: (j, n) int8, ±1.
    A direction is an independent rescaling (or sign flip) of the classes; a tensor axis takes each direction to an
    integer exponent of its own. The arrays are read-only copies. Raises SymmetryError on anything else.
    """

    perm: IntArray
    scale: FloatArray
    sign: SignArray

    def __post_init__(self) -> None:
        perm = as_permutations(self.perm, 1, "The permutation")
        object.__setattr__(self, "perm", perm)
        object.__setattr__(self, "scale", as_scales(self.scale, (None, perm.size), "The scale"))
        object.__setattr__(self, "sign", as_signs(self.sign, (None, perm.size), "The sign"))

    @classmethod
    def of(cls, perm: ArrayLike, scale: ArrayLike | None = None, sign: ArrayLike | None = None) -> Element:
        """Return element from (n,) or (k, n) scales and (n,) or (j, n) signs; None means no such direction."""
        order = np.asarray(perm)
        return cls(order, _rows(scale, order.size, np.float64), _rows(sign, order.size, np.int8))

    @classmethod
    def identity(cls, n: int, scales: int = 0, signs: int = 0) -> Element:
        """Return the neutral element on n classes with `scales` scale and `signs` sign directions."""
        return cls(np.arange(n), np.ones((scales, n)), np.ones((signs, n), dtype=np.int8))

    @property
    def n(self) -> int:
        """Number of classes on the axis."""
        return self.perm.size

    @property
    def scales(self) -> int:
        """Number k of scale directions."""
        return len(self.scale)

    @property
    def signs(self) -> int:
        """Number j of sign directions."""
        return len(self.sign)

    @property
    def order(self) -> int:
        """Order of the permutation part: the least common multiple of its cycle lengths."""
        return math.lcm(*(int(length) for length in np.unique(_cycle_lengths(self.perm))))

    @property
    def is_identity(self) -> bool:
        """Whether it moves, scales and flips nothing."""
        unmoved = np.array_equal(self.perm, np.arange(self.n))
        return unmoved and bool(np.all(self.scale == 1.0)) and bool(np.all(self.sign == 1))

    @property
    def is_power_of_two(self) -> bool:
        """Whether every scale is a power of two, so that acting is exact in floating point."""
        return bool(np.all(np.frexp(self.scale)[0] == 0.5))

    def compose(self, other: Element) -> Element:
        """Return the element that acts as `other` first, then as self: `(g @ h).act(x) == g.act(h.act(x))`.

        Hence perm = p_h[p_g] and scale = s_g * s_h[p_g]. Raises SymmetryError unless both have the same shape.
        """
        self._check_same_kind(other)
        with np.errstate(over="ignore", under="ignore"):  # 0 and inf are refused by the constructor
            scale = self.scale * other.scale[:, self.perm]
        return Element(other.perm[self.perm], scale, self.sign * other.sign[:, self.perm])

    def __matmul__(self, other: Element) -> Element:
        return self.compose(other)

    def inverse(self) -> Element:
        """Return the element with `g @ g.inverse()` neutral (up to rounding of scales that are not powers of two)."""
        back = np.empty_like(self.perm)
        back[self.perm] = np.arange(self.n)
        return Element(back, integer_power(self.scale[:, back], -1), self.sign[:, back])

    def dual(self) -> Element:
        """Return the action on a contracted partner axis: `sum((g·x) * (g.dual()·w)) == sum(x * w)`.

        Same permutation and sign, inverse scale; equal to acting as g with all exponents negated.
        """
        return Element(self.perm, integer_power(self.scale, -1), self.sign)

    def power(self, exponent: int) -> Element:
        """g composed with itself `exponent` times, by repeated squaring; negative exponents invert."""
        result = Element.identity(self.n, self.scales, self.signs)
        square, rest = (self if exponent >= 0 else self.inverse()), abs(exponent)
        while rest:
            if rest & 1:
                result = result @ square
            rest >>= 1
            square = square @ square if rest else square
        return result

    def factor(self, scale_exponents: ArrayLike | None = None, sign_exponents: ArrayLike | None = None) -> FloatArray:
        """(n,) float64: the product over directions of scale^exponent and sign^exponent; None means exponents 1."""
        powers = as_exponents(scale_exponents, self.scales, "scale_exponents")
        parities = as_exponents(sign_exponents, self.signs, "sign_exponents")
        result = np.ones(self.n)
        with np.errstate(over="ignore", under="ignore"):
            for row, exponent in zip(self.scale, powers, strict=True):
                result *= integer_power(row, exponent)
        as_scales(result, (self.n,), "The product of scales")
        for flips, exponent in zip(self.sign, parities, strict=True):
            if exponent % 2:
                result *= flips
        return result

    def act(
        self,
        array: NDArray[Any],
        axis: int = 0,
        scale_exponents: ArrayLike | None = None,
        sign_exponents: ArrayLike | None = None,
    ) -> NDArray[Any]:
        """Return new array with the element applied to `axis` (size n), of the dtype that came in.

        Exact for power-of-two scales, unless a product leaves the normal range of the dtype. Exponents, one integer
        per direction, say how the axis takes part: 1 (default), 0 (not), -1 (dual), or more.
        Raises SymmetryError on a wrong axis or size, on scaling an integer tensor, and on overflow.
        """
        takes_part = self.scales > 0 or self.signs > 0 or scale_exponents is not None or sign_exponents is not None
        factor = self.factor(scale_exponents, sign_exponents) if takes_part else None
        return gather_and_scale(array, axis, self.perm, factor)

    def close(self, other: Element, rtol: float = 1e-12) -> bool:
        """Return whether permutation and signs are equal, and scales within the relative tolerance."""
        same = self.scale.shape == other.scale.shape and np.array_equal(self.perm, other.perm)
        return same and np.array_equal(self.sign, other.sign) and np.allclose(self.scale, other.scale, rtol, 0.0)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Element) and self.close(other, rtol=0.0)

    def __hash__(self) -> int:
        return hash((self.perm.tobytes(), self.scale.tobytes(), self.sign.tobytes()))

    def __repr__(self) -> str:
        return f"Element(n={self.n}, scales={self.scales}, signs={self.signs}, order={self.order})"

    def _check_same_kind(self, other: Element) -> None:
        mine, theirs = ((g.n, g.scales, g.signs) for g in (self, other))
        if mine != theirs:
            raise SymmetryError(
                f"Elements with (classes, scales, signs) = {mine} and {theirs} cannot be composed; these must agree."
            )


def _rows(value: ArrayLike | None, n: int, dtype: type[np.generic]) -> NDArray[Any]:
    if value is None:
        return np.ones((0, n), dtype=dtype)
    given = np.asarray(value)
    return given[None, :] if given.ndim == 1 else given


def _cycle_lengths(perm: IntArray) -> IntArray:
    """Length of every cycle. Pointer doubling: after r rounds an index knows the least label among 2^r successors."""
    label, jump = np.arange(perm.size), perm
    reach = 1
    while reach < perm.size:
        smaller = np.minimum(label, label[jump])
        if np.array_equal(smaller, label):  # a fixpoint: every label is already the least of its cycle
            break
        label, jump, reach = smaller, jump[jump], 2 * reach
    lengths = np.bincount(label, minlength=perm.size)
    return lengths[lengths > 0].astype(np.int64)
