"""What a bounding rule sees of its node, and the table of rules: one per operator, none for what is not understood."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.constants import attribute
from cipm_ir.ir.labels import Array, State
from cipm_ir.runtime.intervals.arithmetic import Bounds, Interval, Precision

Shape = tuple[int, ...]
Rule = Callable[["Site"], "Interval | list[Interval | None] | None"]
"""Bounds of the only output, or of each; None where nothing can be said."""

_RULES: dict[str, Rule] = {}


def bounds(*operators: str) -> Callable[[Rule], Rule]:
    """Register the rule of some operators of the standard domain."""

    def decorate(rule: Rule) -> Rule:
        for name in operators:
            if name in _RULES:
                raise ValueError(f"{name} has a bounding rule already")
            _RULES[name] = rule
        return rule

    return decorate


def rule_of(node: ir.Node) -> Rule | None:
    """The rule of a node, None where there is none."""
    return None if node.domain else _RULES.get(node.op_type)


@dataclass
class Site:
    """One node with the bounds of its inputs (None: left out). ``shapes`` holds two shapes of each input."""

    node: ir.Node
    version: int
    inputs: list[Interval | None]
    states: list[State | None]
    raws: list[Array | None]
    literals: list[Array | None]
    shapes: list[tuple[Shape, Shape]]
    outs: list[Shape | None]
    p: Precision

    def attr(self, name: str, default: Any = None) -> Any:
        """Value of an attribute; bytes as text."""
        value = attribute(self.node, name, default)
        return value.decode() if isinstance(value, bytes) else value

    def has(self, index: int) -> bool:
        """Whether the node has this input."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def of(self, index: int) -> Interval:
        """Bounds of a required input."""
        found = self.inputs[index]
        assert found is not None
        return found

    def state(self, index: int) -> State:
        """Shape and labels of a required input."""
        found = self.states[index]
        assert found is not None
        return found

    def const(self, index: int) -> Array | None:
        """A small constant input that no dynamic size enters."""
        return self.literals[index] if index < len(self.literals) else None

    def raw(self, index: int) -> Array | None:
        """The stored array of a parameter."""
        return self.raws[index] if index < len(self.raws) else None

    def shape(self, index: int) -> Shape:
        """Shape of an input under the first assignment."""
        return self.shapes[index][0]

    def rank(self, index: int) -> int:
        """Rank of an input."""
        return len(self.shapes[index][0])

    def size(self, index: int, axis: int) -> int | None:
        """Size of an axis of an input, None where it is dynamic."""
        first, second = self.shapes[index]
        return first[axis] if first[axis] == second[axis] else None

    def out(self, index: int = 0) -> Shape:
        """Shape of an output under the first assignment."""
        found = self.outs[index]
        assert found is not None
        return found

    def axis(self, name: str, default: int, rank: int) -> int:
        """An attribute that names an axis."""
        return int(self.attr(name, default)) % max(rank, 1)


def filled(x: Interval, axis: int, size: int) -> Interval:
    """Bounds with an axis at full size."""
    if x.shape[axis] == size:
        return x
    return x.map(lambda e: np.repeat(e, size, axis=axis))


def refit(x: Interval, old: Sequence[int], new: Sequence[int]) -> Interval:
    """Bounds of a value of shape ``old`` after a row-major reshape; runs of axes without a difference stay size 1."""
    from cipm_ir.ir.labels import reshape_groups

    groups = reshape_groups(old, new)
    if groups is None:
        return Interval.unbounded(len(new)).hull(Interval(x.lo.min(), x.hi.max()))
    full: list[int] = []
    target: list[int] = []
    for before, after in groups:
        differs = any(x.shape[a] != 1 for a in before)
        full += [old[a] if differs else 1 for a in before]
        target += [new[b] if differs else 1 for b in after]

    def move(e: Bounds) -> Bounds:
        return np.asarray(np.broadcast_to(e, full)).reshape(target)

    return x.map(move)
