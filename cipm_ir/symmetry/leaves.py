"""Parameters as the walk sees them: leaves, their factors, and the nodes that pinned something."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.labels import Factor, State

Use = tuple[int, int]
"""(position of the node in the graph, number of its input)."""


@dataclass
class LeafFactor:
    """Atoms ``base .. base + size`` over some axes of a parameter.

    ``groups``: 0 for a plain factor over ``axes``; otherwise the atoms are (groups, shape[axis]) and name positions of
    ``axes[1]`` separately in each group of consecutive rows of ``axes[0]``. ``epsilon`` is set for a variance.
    """

    leaf: int
    axes: tuple[int, ...]
    base: int
    shape: tuple[int, ...]
    scale_var: int
    groups: int = 0
    epsilon: float | None = None
    active: bool = True

    @property
    def size(self) -> int:
        """Number of atoms."""
        return math.prod(self.shape)


@dataclass
class Leaf:
    """A parameter as used in some places; another use of the same tensor may be another leaf."""

    name: str
    shape: tuple[int, ...]
    dtype: ir.DataType
    uses: list[Use]
    state: State
    factors: list[LeafFactor] = field(default_factory=list)
    constant: bool = False
    """Made by the program itself (a mask of ones), as its frontend says: no unit consists of its entries alone."""
    filled: bool = False
    """The output of a ConstantOfShape: equal entries, so that only its size ever changes."""

    @property
    def stacked(self) -> State:
        """Its state; of a stack of matrices, with the labels that units have in each of them."""
        rows = [f for f in self.factors if f.active and f.groups == self.shape[0]]
        if not rows:
            return self.state
        made = [Factor(f.axes, np.arange(f.base, f.base + f.size).reshape(f.shape), f.scale_var) for f in rows]
        taken = {a for f in made for a in f.axes}
        return State(self.shape, (*made, *(f for f in self.state.factors if not taken & set(f.axes))))


@dataclass(frozen=True)
class OpaqueNode:
    """A node that pinned what reached it, and why; ``position``: in the graph."""

    name: str
    op: str
    reason: str
    inputs: tuple[str, ...]
    position: int = -1

    def __str__(self) -> str:
        return f"{self.op} {self.name}: {self.reason}"
