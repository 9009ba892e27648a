"""Dense elements: an orthogonal or invertible matrix on one axis, where everything that reads the axis is linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cipm_ir.algebra.element import Element
from cipm_ir.algebra.hadamard import hadamard_matrix
from cipm_ir.algebra.validation import FloatArray
from cipm_ir.errors import SymmetryError

ORTHOGONAL = 1e-6
"""Largest entry of ``A Aᵀ - 1`` with which a matrix counts as orthogonal."""
LARGEST_CONDITION = 1e6
"""Matrices with a larger condition number lose more than half of the digits of float32 and are refused."""


@dataclass(frozen=True, eq=False, repr=False)
class DenseElement:
    """An element of GL(n): ``(g·x)[i] = sum_j matrix[i, j] * x[j]``.

    matrix: (n, n) float64, a read-only copy, invertible with a condition number of at most 1e6.
    Raises SymmetryError on anything else.
    """

    matrix: FloatArray

    def __post_init__(self) -> None:
        given = np.asarray(self.matrix)
        if given.ndim != 2 or given.shape[0] != given.shape[1] or given.dtype.kind not in "fiu":
            raise SymmetryError(
                f"A dense element has shape {given.shape} and dtype {given.dtype}; give a square, real matrix."
            )
        matrix = given.astype(np.float64)
        if not np.isfinite(matrix).all():
            raise SymmetryError("The matrix of a dense element has entries that are not finite.")
        matrix.setflags(write=False)
        object.__setattr__(self, "matrix", matrix)
        if not self.is_orthogonal:
            condition = float(np.linalg.cond(matrix)) if len(matrix) else 1.0
            if not condition <= LARGEST_CONDITION:
                raise SymmetryError(
                    f"The matrix of a dense element has condition number {condition:.3g}; "
                    f"it must be invertible, with at most {LARGEST_CONDITION:g}."
                )

    # ------------------------------------------------------------ making
    @classmethod
    def identity(cls, n: int) -> DenseElement:
        """Return the neutral element on n classes."""
        return cls(np.eye(n))

    @classmethod
    def of(cls, element: Element) -> DenseElement:
        """Return the matrix of a monomial element, each of its directions taken once."""
        matrix = np.zeros((element.n, element.n))
        matrix[np.arange(element.n), element.perm] = element.factor()
        return cls(matrix)

    @classmethod
    def orthogonal(cls, n: int, rng: np.random.Generator) -> DenseElement:
        """Return a uniform (Haar) element of O(n): QR of a Gaussian matrix, signs fixed (Mezzadri 2007)."""
        q, r = np.linalg.qr(rng.standard_normal((n, n)))
        return cls(q * np.where(np.diag(r) < 0, -1.0, 1.0))

    @classmethod
    def invertible(cls, n: int, rng: np.random.Generator, condition: float = 10.0) -> DenseElement:
        """Return a random element of GL(n) with singular values between 1 and ``condition``, up to a common factor."""
        middle = np.exp(rng.uniform(-0.5, 0.5, n) * np.log(condition))
        return cls((cls.orthogonal(n, rng).matrix * middle) @ cls.orthogonal(n, rng).matrix)

    @classmethod
    def hadamard(cls, n: int, rng: np.random.Generator) -> DenseElement:
        """Return a randomized Hadamard matrix: it spreads one large entry evenly over all (QuIP#, Tseng et al. 2024).

        Rows and columns get random signs. Where no Hadamard matrix of order n is known here, n = 2^k m with m odd
        or small: the Kronecker product of one of order 2^k and a Haar orthogonal block of size m.
        """
        matrix = hadamard_matrix(n)
        if matrix is None:
            power = n & -n
            block = cls.orthogonal(n // power, rng).matrix
            whole = hadamard_matrix(power)
            matrix = np.kron(np.ones((1, 1)) if whole is None else whole, block) / np.sqrt(power)
        else:
            matrix = matrix / np.sqrt(n)
        left, right = 2.0 * rng.integers(0, 2, (2, n)) - 1.0
        return cls(left[:, None] * matrix * right)

    # ------------------------------------------------------------ reading
    @property
    def n(self) -> int:
        """Number of classes on the axis."""
        return len(self.matrix)

    @property
    def is_orthogonal(self) -> bool:
        """Whether the inverse is the transpose, within 1e-6."""
        gram = self.matrix @ self.matrix.T
        gram[np.diag_indices(self.n)] -= 1.0
        return bool(np.abs(gram).max(initial=0.0) <= ORTHOGONAL)

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return bool(np.array_equal(self.matrix, np.eye(self.n)))

    def belongs_to(self, level: Literal["", "O", "GL"]) -> bool:
        """Return whether it is an element of O(n), or of GL(n); of no group that has no dense elements."""
        return level == "GL" or (level == "O" and self.is_orthogonal)

    # ------------------------------------------------------------ algebra
    def compose(self, other: DenseElement | Element) -> DenseElement:
        """Return the element that acts as `other` first, then as self: `(g @ h).act(x) == g.act(h.act(x))`."""
        made = DenseElement.of(other) if isinstance(other, Element) else other
        if made.n != self.n:
            raise SymmetryError(f"Elements on {self.n} and {made.n} classes cannot be composed.")
        return DenseElement(self.matrix @ made.matrix)

    def __matmul__(self, other: DenseElement | Element) -> DenseElement:
        return self.compose(other)

    def inverse(self) -> DenseElement:
        """Return the element with `g @ g.inverse()` neutral, up to rounding."""
        return DenseElement(np.linalg.inv(self.matrix).astype(np.float64))

    def dual(self) -> DenseElement:
        """Return the inverse transpose, which acts on a contracted partner.

        `sum((g·x) * (g.dual()·w)) == sum(x * w)`.
        """
        return DenseElement(np.linalg.inv(self.matrix).T.astype(np.float64))

    def act(self, array: NDArray[Any], axis: int = 0) -> NDArray[Any]:
        """Return new array with the matrix applied to `axis` (size n): computed in float64, rounded once to its dtype.

        Raises SymmetryError on a wrong axis or size, and on a dtype that is not a floating type.
        """
        source = np.asarray(array)
        if not -source.ndim <= axis < source.ndim or source.shape[axis] != self.n:
            raise SymmetryError(f"Axis {axis} of a tensor of shape {source.shape} does not have {self.n} classes.")
        if source.dtype.kind in "iub":
            raise SymmetryError(f"A tensor of dtype {source.dtype} can be permuted but not rotated.")
        last = np.moveaxis(source, axis, -1).astype(np.float64) @ self.matrix.T
        return np.moveaxis(last, -1, axis).astype(source.dtype)

    def close(self, other: DenseElement, atol: float = 1e-10) -> bool:
        """Return whether the matrices agree within the tolerance."""
        return self.n == other.n and bool(np.allclose(self.matrix, other.matrix, 0.0, atol))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DenseElement) and bool(np.array_equal(self.matrix, other.matrix))

    def __hash__(self) -> int:
        return hash(self.matrix.tobytes())

    def __repr__(self) -> str:
        return f"DenseElement(n={self.n}, {'orthogonal' if self.is_orthogonal else 'invertible'})"
