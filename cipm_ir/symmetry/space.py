"""`Space`: a hidden axis of a program as its user sees it, with its group."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cipm_ir.algebra import Dense, DenseElement, Element, Group
from cipm_ir.errors import SymmetryError
from cipm_ir.symmetry.dense import LinearityTable
from cipm_ir.symmetry.spaces import Linearity


@dataclass(frozen=True)
class Space:
    """Interchangeable hidden units (``kind`` "units"), heads or groups ("blocks"), or cells where two families of
    blocks cross ("cells": may be scaled, not exchanged).

    ``members`` names the tensors that move, as ``name[axis]``; ``parent`` is (block space, index) for a block's units.
    ``exact`` says for each scale direction whether powers of two leave every result the same bit for bit.
    """

    name: str
    kind: str
    size: int
    group: Group
    members: tuple[str, ...] = field(compare=False)
    exact: tuple[bool, ...] = field(compare=False, default=())
    parent: tuple[Space, int] | None = field(compare=False, default=None, repr=False)
    levels: LinearityTable | None = field(compare=False, default=None, repr=False)
    """Dense groups of the program's spaces, found when first asked for."""
    number: int = field(compare=False, default=-1, repr=False)
    """Position among them."""

    @property
    def linearity(self) -> Linearity:
        """How linear everything on the space is, and why not more."""
        return Linearity() if self.levels is None else self.levels[self.number]

    @property
    def dense(self) -> Dense:
        """ "O" or "GL" where the units may also be mixed, by an orthogonal or by any invertible matrix; else "".

        Everything on such a space is linear, but for normalizations by the length of the vector in the case of "O".
        """
        return self.linearity.level

    @property
    def admits(self) -> str:
        """Its group, and the dense one where there is one: ``R* wr S(16), GL(16)``."""
        return f"{self.group}, {self.dense}({self.size})" if self.dense else str(self.group)

    def __str__(self) -> str:
        return f"@{self.name} : {self.size}  {self.admits}"

    def random(self, rng: np.random.Generator, *, power_of_two: bool = False) -> Element:
        """Return a random element of the (monomial) group: uniform permutation and signs, scales e^N(0,1) (or 2^-3 ..
        2^3).

        With ``power_of_two``, directions in which even these would round (epsilon of a normalization) stay at 1.
        """
        element = self.group.random(rng, power_of_two=power_of_two)
        if not power_of_two or all(self.exact):
            return element
        scale = np.where(np.asarray(self.exact)[:, None], element.scale, 1.0)
        return Element(element.perm, scale, element.sign)

    def identity(self) -> Element:
        """Return the neutral element."""
        return Element.identity(self.size, self.group.scales, self.group.signs)

    def check_dense(self, element: DenseElement) -> None:
        """`SymmetryError` unless a matrix belongs to the dense group of this space."""
        if element.n == self.size and element.belongs_to(self.dense):
            return
        has = f"{self.dense}({self.size})" if self.dense else f"only {self.group}, which holds no dense matrices"
        raise SymmetryError(f"{element!r} does not act on space @{self.name}: it admits {has}.")
