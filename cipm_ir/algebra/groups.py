"""The lattice of groups that can act on one space: 1 < S < {R>0 wr S, B} < R* wr S < GL, and B < O < GL."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from cipm_ir.algebra.dense import DenseElement
from cipm_ir.algebra.element import Element
from cipm_ir.errors import SymmetryError

Dense: TypeAlias = Literal["", "O", "GL"]

# What a dense group contains of the monomial one: (permutes, scales, signs); and its place in "" < O < GL.
_MONOMIAL_PART: dict[Dense, tuple[bool, int, int]] = {"O": (True, 0, 1), "GL": (True, 1, 1)}
_LEVELS: tuple[Dense, ...] = ("", "O", "GL")


@dataclass(frozen=True)
class Group:
    """The group on a space of n classes: permutations or not, k scale and j sign directions, or O(n) or GL(n).

    A description, compared as such: S(1) and 1 name the same group but differ here. `dense` decides the other
    fields: O(n) contains the permutations and signs, GL(n) one scale direction besides.
    Raises SymmetryError on negative sizes and unknown dense groups.
    """

    n: int
    permutes: bool = True
    scales: int = 0
    signs: int = 0
    dense: Dense = ""

    def __post_init__(self) -> None:
        if min(self.n, self.scales, self.signs) < 0:
            sizes = (self.n, self.scales, self.signs)
            raise SymmetryError(f"A group cannot have (classes, scales, signs) = {sizes}; use 0 or more.")
        if self.dense not in _LEVELS:
            raise SymmetryError(f"Unknown dense group {self.dense!r}; use '', 'O' or 'GL'.")
        if self.dense:
            for field, value in zip(("permutes", "scales", "signs"), _MONOMIAL_PART[self.dense], strict=True):
                object.__setattr__(self, field, value)

    @classmethod
    def trivial(cls, n: int) -> Group:
        """`1`: nothing may move."""
        return cls(n, permutes=False)

    @classmethod
    def symmetric(cls, n: int) -> Group:
        """`S(n)`: permutations."""
        return cls(n)

    @classmethod
    def positive(cls, n: int) -> Group:
        """`R>0 wr S(n)`: permutations and positive scalings."""
        return cls(n, scales=1)

    @classmethod
    def hyperoctahedral(cls, n: int) -> Group:
        """`B(n)`: permutations and signs."""
        return cls(n, signs=1)

    @classmethod
    def monomial(cls, n: int) -> Group:
        """`R* wr S(n)`: permutations and non-zero scalings."""
        return cls(n, scales=1, signs=1)

    @classmethod
    def orthogonal(cls, n: int) -> Group:
        """`O(n)`: rotations and reflections."""
        return cls(n, dense="O")

    @classmethod
    def general_linear(cls, n: int) -> Group:
        """`GL(n)`: all invertible maps."""
        return cls(n, dense="GL")

    @property
    def is_trivial(self) -> bool:
        """Whether it is described as the trivial group."""
        return not (self.permutes or self.scales or self.signs)

    @property
    def monomial_part(self) -> Group:
        """The largest subgroup without a dense matrix: itself, B(n) for O(n), R* wr S(n) for GL(n)."""
        return Group(self.n, self.permutes, self.scales, self.signs)

    @property
    def order(self) -> int | float:
        """Number of elements: an exact int, or math.inf."""
        if self.n == 0:
            return 1
        if self.scales or (self.dense == "O" and self.n > 1):
            return math.inf
        flips = 1 << (self.signs * self.n)
        return flips * math.factorial(self.n) if self.permutes else flips

    @property
    def name(self) -> str:
        """As people write it: `1`, `S(16)`, `R>0 wr S(16)`, `B(16)`, `R* wr S(16)`, `R>0^16`, `(R>0^2) wr S(16)`."""
        if self.dense:
            return f"{self.dense}({self.n})"
        if not self.permutes:
            return "1" if self.is_trivial else f"{self._per_class()}^{self.n}"
        if (self.scales, self.signs) == (0, 1):
            return f"B({self.n})"
        return f"{self._per_class()} wr S({self.n})" if self.scales or self.signs else f"S({self.n})"

    def __str__(self) -> str:
        return self.name

    def meet(self, other: Group) -> Group:
        """Return the largest group of the lattice inside both: fewer directions, permutations only where both have
        them.

        Commutative, associative, idempotent. meet(O, R>0 wr S) = S and meet(O, R* wr S) = B.
        Raises SymmetryError where the groups act on different numbers of classes.
        """
        self._check_same_size(other)
        dense = min(self.dense, other.dense, key=_LEVELS.index)
        permutes = self.permutes and other.permutes
        return Group(self.n, permutes, min(self.scales, other.scales), min(self.signs, other.signs), dense)

    def __le__(self, other: Group) -> bool:
        return self.meet(other) == self

    def __lt__(self, other: Group) -> bool:
        return self <= other and self != other

    def random(self, rng: np.random.Generator, power_of_two: bool = False) -> Element:
        """Return element with a uniform permutation, scales e^N(0,1) and uniform signs; of the monomial part if dense.

        With power_of_two the scales are 2^e, e uniform in -3..3, so that acting is exact in floating point.
        """
        perm = rng.permutation(self.n) if self.permutes else np.arange(self.n)
        shape = (self.scales, self.n)
        scale = np.ldexp(1.0, rng.integers(-3, 4, shape)) if power_of_two else np.exp(rng.standard_normal(shape))
        return Element(perm, scale, 2 * rng.integers(0, 2, (self.signs, self.n), np.int8) - np.int8(1))

    def contains(self, element: Element) -> bool:
        """Return whether the element belongs to the group; its directions beyond those of the group must be neutral."""
        return (
            element.n == self.n
            and (self.permutes or np.array_equal(element.perm, np.arange(self.n)))
            and bool(np.all(element.scale[self.scales :] == 1.0))
            and bool(np.all(element.sign[self.signs :] == 1))
        )

    def __contains__(self, element: object) -> bool:
        if isinstance(element, DenseElement):
            return element.n == self.n and element.belongs_to(self.dense)
        return isinstance(element, Element) and self.contains(element)

    def _check_same_size(self, other: Group) -> None:
        if self.n != other.n:
            raise SymmetryError(f"{self} and {other} act on {self.n} and {other.n} classes; they cannot be compared.")

    def _per_class(self) -> str:
        if (self.scales, self.signs) == (1, 1):
            return "R*"
        parts = [_to_the(symbol, count) for symbol, count in (("R>0", self.scales), ("±1", self.signs)) if count]
        text = " x ".join(parts)
        return text if len(parts) == 1 and max(self.scales, self.signs) == 1 else f"({text})"


def _to_the(symbol: str, count: int) -> str:
    return symbol if count == 1 else f"{symbol}^{count}"
