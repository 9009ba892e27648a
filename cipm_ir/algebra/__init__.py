"""The monomial group on a hidden axis: elements, groups, their lattice, wreath products for blocks.

Elements act in gather form, `(g·x)[i] = s[i] * x[p[i]]`, and compose so that `(g @ h).act(x) == g.act(h.act(x))`.
Everything is factored (index and scale arrays), so that every operation is linear in the size of the axis.
"""

from __future__ import annotations

from cipm_ir.algebra.element import Element
from cipm_ir.algebra.groups import Group
from cipm_ir.algebra.wreath import BlockElement, Wreath

__all__ = ["BlockElement", "Element", "Group", "Wreath"]
