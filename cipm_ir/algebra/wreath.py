"""Wreath products for blocks: classes move inside a block, blocks (attention heads, conv groups) move as wholes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cipm_ir.algebra.action import integer_power
from cipm_ir.algebra.element import Element
from cipm_ir.algebra.groups import Group
from cipm_ir.algebra.validation import FloatArray, IntArray, SignArray, as_permutations, as_scales, as_signs
from cipm_ir.errors import SymmetryError


@dataclass(frozen=True, eq=False, repr=False)
class BlockElement:
    """An element on m blocks of n classes: `(g·x)[b, i] = s[b, i] * x[outer[b], p[b, i]]`.

    outer: (m,) int64, the permutation of the blocks. perm: (m, n) int64, a permutation per block. scale: (m, k, n)
    float64, positive and finite. sign: (m, j, n) int8, ±1. Row b belongs to the block that arrives at b.
    The arrays are read-only copies. Raises SymmetryError on anything else.
    """

    outer: IntArray
    perm: IntArray
    scale: FloatArray
    sign: SignArray

    def __post_init__(self) -> None:
        outer = as_permutations(self.outer, 1, "The permutation of the blocks")
        perm = as_permutations(self.perm, 2, "The permutation inside the blocks")
        if perm.shape[0] != outer.size:
            raise SymmetryError(f"{outer.size} blocks need as many inner permutations, but {perm.shape[0]} are given.")
        m, n = perm.shape
        object.__setattr__(self, "outer", outer)
        object.__setattr__(self, "perm", perm)
        object.__setattr__(self, "scale", as_scales(self.scale, (m, None, n), "The scale of the blocks"))
        object.__setattr__(self, "sign", as_signs(self.sign, (m, None, n), "The sign of the blocks"))

    @classmethod
    def of(cls, outer: ArrayLike, inner: Sequence[Element]) -> BlockElement:
        """From one Element per block, at least one, all of one size and one number of directions."""
        kinds = {(element.n, element.scales, element.signs) for element in inner}
        if len(kinds) != 1:
            raise SymmetryError(f"All blocks must share one (classes, scales, signs), but there are {sorted(kinds)}.")
        perm, scale, sign = (np.stack(part) for part in zip(*((e.perm, e.scale, e.sign) for e in inner), strict=True))
        return cls(np.asarray(outer), perm, scale, sign)

    @classmethod
    def identity(cls, m: int, n: int, scales: int = 0, signs: int = 0) -> BlockElement:
        """Return the neutral element on m blocks of n classes."""
        perm = np.broadcast_to(np.arange(n), (m, n))
        return cls(np.arange(m), perm, np.ones((m, scales, n)), np.ones((m, signs, n), dtype=np.int8))

    @property
    def m(self) -> int:
        """Number of blocks."""
        return len(self.perm)

    @property
    def n(self) -> int:
        """Number of classes in each block."""
        return int(self.perm.shape[1])

    @property
    def scales(self) -> int:
        """Number k of scale directions."""
        return int(self.scale.shape[1])

    @property
    def signs(self) -> int:
        """Number j of sign directions."""
        return int(self.sign.shape[1])

    @property
    def is_identity(self) -> bool:
        """Whether it moves, scales and flips nothing."""
        return self.flatten().is_identity

    def block(self, index: int) -> Element:
        """Return the inner element of the block that arrives at `index`."""
        return Element(self.perm[index], self.scale[index], self.sign[index])

    def compose(self, other: BlockElement) -> BlockElement:
        """Return the element that acts as `other` first, then as self.

        SymmetryError unless both have the same shape.
        """
        mine, theirs = ((g.m, g.n, g.scales, g.signs) for g in (self, other))
        if mine != theirs:
            raise SymmetryError(
                f"Block elements with (blocks, classes, scales, signs) = {mine} and {theirs} cannot be composed."
            )
        perm = np.take_along_axis(other.perm[self.outer], self.perm, axis=1)
        along = self.perm[:, None, :]
        with np.errstate(over="ignore", under="ignore"):  # 0 and inf are refused by the constructor
            scale = self.scale * np.take_along_axis(other.scale[self.outer], along, axis=2)
        sign = self.sign * np.take_along_axis(other.sign[self.outer], along, axis=2)
        return BlockElement(other.outer[self.outer], perm, scale, sign)

    def __matmul__(self, other: BlockElement) -> BlockElement:
        return self.compose(other)

    def inverse(self) -> BlockElement:
        """Return the element with `g @ g.inverse()` neutral (up to rounding of scales that are not powers of two)."""
        back = np.empty_like(self.outer)
        back[self.outer] = np.arange(self.m)
        perm = np.empty_like(self.perm)
        np.put_along_axis(perm, self.perm[back], np.broadcast_to(np.arange(self.n), perm.shape), axis=1)
        along = perm[:, None, :]
        scale = integer_power(np.take_along_axis(self.scale[back], along, axis=2), -1)
        return BlockElement(back, perm, scale, np.take_along_axis(self.sign[back], along, axis=2))

    def dual(self) -> BlockElement:
        """Return the action on a contracted partner axis: same permutations and signs, inverse scale."""
        return BlockElement(self.outer, self.perm, integer_power(self.scale, -1), self.sign)

    def flatten(self) -> Element:
        """Return the same element on the merged axis of m n classes, block after block; a homomorphism."""
        perm = self.outer[:, None] * self.n + self.perm
        scale = self.scale.transpose(1, 0, 2).reshape(self.scales, self.m * self.n)
        return Element(perm.ravel(), scale, self.sign.transpose(1, 0, 2).reshape(self.signs, self.m * self.n))

    def act(
        self,
        array: NDArray[Any],
        axis: int | tuple[int, int] = 0,
        scale_exponents: ArrayLike | None = None,
        sign_exponents: ArrayLike | None = None,
    ) -> NDArray[Any]:
        """Return new array with the element applied to a merged axis of size m n, or to a pair (block axis, class
        axis).

        Dtype, exactness, exponents and errors as for Element.act.
        """
        if isinstance(axis, int):
            return self.flatten().act(array, axis, scale_exponents, sign_exponents)
        source = np.asarray(array)
        pair = {position % source.ndim for position in axis if -source.ndim <= position < source.ndim}
        if len(pair) != 2:
            raise SymmetryError(f"{axis} is not a pair of distinct axes of a tensor of shape {source.shape}.")
        front = np.moveaxis(source, axis, (0, 1))
        if front.shape[:2] != (self.m, self.n):
            raise SymmetryError(f"Axes {axis} have sizes {front.shape[:2]}, but the element has {(self.m, self.n)}.")
        merged = front.reshape(self.m * self.n, *front.shape[2:])
        acted = self.flatten().act(merged, 0, scale_exponents, sign_exponents)
        return np.moveaxis(acted.reshape(front.shape), (0, 1), axis)

    def close(self, other: BlockElement, rtol: float = 1e-12) -> bool:
        """Return whether permutations and signs are equal, and scales within the relative tolerance."""
        same = self.scale.shape == other.scale.shape and np.array_equal(self.outer, other.outer)
        same = same and np.array_equal(self.perm, other.perm) and np.array_equal(self.sign, other.sign)
        return same and np.allclose(self.scale, other.scale, rtol, 0.0)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockElement) and self.close(other, rtol=0.0)

    def __hash__(self) -> int:
        return hash((self.outer.tobytes(), self.perm.tobytes(), self.scale.tobytes(), self.sign.tobytes()))

    def __repr__(self) -> str:
        return f"BlockElement(m={self.m}, n={self.n}, scales={self.scales}, signs={self.signs})"


@dataclass(frozen=True)
class Wreath:
    """The group `inner wr S(m)`: an element of `inner` in each of m blocks, and the blocks permuted as wholes."""

    inner: Group
    m: int

    def __post_init__(self) -> None:
        if self.m < 0:
            raise SymmetryError(f"A wreath product cannot have {self.m} blocks; use 0 or more.")

    @property
    def order(self) -> int | float:
        """Number of elements, inner.order^m m!: an exact int, or math.inf."""
        inner = self.inner.order
        if self.m == 0:
            return 1
        return inner**self.m * math.factorial(self.m) if isinstance(inner, int) else math.inf

    @property
    def name(self) -> str:
        """As people write it: `S(32) wr S(12)`, `(R>0 wr S(32)) wr S(12)`."""
        inner = self.inner.name
        return f"({inner}) wr S({self.m})" if " wr " in inner or "^" in inner else f"{inner} wr S({self.m})"

    def __str__(self) -> str:
        return self.name

    def random(self, rng: np.random.Generator, power_of_two: bool = False) -> BlockElement:
        """Return element with the blocks permuted uniformly and each inner part drawn as by `Group.random`."""
        m, n, inner = self.m, self.inner.n, self.inner
        perm = np.broadcast_to(np.arange(n), (m, n))
        if inner.permutes:
            perm = rng.permuted(perm, axis=1)
        shape = (m, inner.scales, n)
        scale = np.ldexp(1.0, rng.integers(-3, 4, shape)) if power_of_two else np.exp(rng.standard_normal(shape))
        return BlockElement(
            rng.permutation(m), perm, scale, 2 * rng.integers(0, 2, (m, inner.signs, n), np.int8) - np.int8(1)
        )

    def contains(self, element: BlockElement) -> bool:
        """Return whether the element belongs to the group; its directions beyond those of the group must be neutral."""
        return (
            (element.m, element.n) == (self.m, self.inner.n)
            and (self.inner.permutes or bool(np.all(element.perm == np.arange(element.n))))
            and bool(np.all(element.scale[:, self.inner.scales :] == 1.0))
            and bool(np.all(element.sign[:, self.inner.signs :] == 1))
        )

    def __contains__(self, element: object) -> bool:
        return isinstance(element, BlockElement) and self.contains(element)
