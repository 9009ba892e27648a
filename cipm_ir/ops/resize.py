"""How literals follow a change of size: what a resize rule sees of its node after a restriction.

Sizes and positions are those of the first shape assignment; ``literal(i)`` is what an input evaluates to now, which for
a computed chain (Shape, Gather, Concat) may already be right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.labels import Array, Labels

Shape = tuple[int, ...]


class Resize(ABC):
    """One node of a restricted program; implemented by `cipm_ir.symmetry.primitives.restrict`."""

    node: ir.Node
    version: int

    @abstractmethod
    def attr(self, name: str, default: Any = None) -> Any:
        """Return the value of an attribute."""

    @abstractmethod
    def set_attr(self, name: str, value: Any) -> None:
        """Replace an integer or list-of-integers attribute."""

    @abstractmethod
    def literal(self, index: int) -> Array | None:
        """Return the value of an input before the restriction, None where it was no constant."""

    @abstractmethod
    def set_literal(self, index: int, value: Array) -> None:
        """Make an input this constant (entries that are right already are left to their computation)."""

    @abstractmethod
    def old(self, index: int) -> Shape:
        """Return the shape of an input before."""

    @abstractmethod
    def new(self, index: int) -> Shape:
        """Return the shape of an input now."""

    @abstractmethod
    def old_out(self, index: int) -> Shape:
        """Return the shape of an output before."""

    @abstractmethod
    def new_out(self, index: int) -> Shape:
        """Return the shape of an output now."""

    @abstractmethod
    def kept(self, index: int, axis: int) -> Labels:
        """Kept positions along an axis of an input; an error where rows of a grid keep different ones."""

    @abstractmethod
    def kept_out(self, index: int, axis: int) -> Labels:
        """Kept positions along an axis of an output."""

    @abstractmethod
    def rows(self, index: int, axis: int, count: int) -> int:
        """Return the number of rows that remain when an axis is read as ``count`` equal rows.

        An error where lengths differ.
        """

    @abstractmethod
    def replace(
        self, op_type: str, inputs: list[ir.Value | None], constants: dict[int, Array], attributes: dict[str, Any]
    ) -> None:
        """Put another operator in the node's place."""


def target_rule(index: int, attribute: str = "shape") -> Any:
    """Rule for an operator whose input ``index`` (or attribute) is the shape of its output (Reshape, Expand)."""

    def rule(r: Resize) -> None:
        old, new = r.old_out(0), r.new_out(0)
        if old == new and r.old(0) == r.new(0):
            return
        from_attr = r.literal(index) is None and r.attr(attribute) is not None
        target = np.asarray(r.attr(attribute) if from_attr else r.literal(index), np.int64).copy()
        if target.size != len(new):  # Expand aligns from the right
            old, new = old[len(old) - target.size :], new[len(new) - target.size :]
        zero_copies = r.node.op_type == "Reshape" and not r.attr("allowzero", 0)
        source = r.new(0)
        for k, size in enumerate(new):
            copied = zero_copies and target[k] == 0 and k < len(source) and source[k] == size
            if target[k] == -1 or copied or (target[k] == 1 and r.node.op_type == "Expand"):
                continue
            if old[k] != size or target[k] == 0:
                target[k] = size
        if from_attr:
            r.set_attr(attribute, target.tolist())
        else:
            r.set_literal(index, target)

    return rule
