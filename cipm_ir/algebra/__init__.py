"""The groups on a hidden axis: monomial and dense elements, the lattice of groups, wreath products for blocks.

Monomial elements act in gather form, `(g·x)[i] = s[i] * x[p[i]]`, and compose so that
`(g @ h).act(x) == g.act(h.act(x))`. They are factored (index and scale arrays), so that every operation is linear in
the size of the axis; only elements of O(n) and GL(n) are matrices.
"""

from __future__ import annotations

from cipm_ir.algebra.dense import DenseElement
from cipm_ir.algebra.element import Element
from cipm_ir.algebra.groups import Dense, Group
from cipm_ir.algebra.wreath import BlockElement, Wreath

__all__ = ["BlockElement", "Dense", "DenseElement", "Element", "Group", "Wreath"]
