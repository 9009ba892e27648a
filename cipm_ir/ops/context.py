"""What a label rule sees of its node, and the moves that many rules share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.constants import attribute
from cipm_ir.ir.labels import ZERO, Array, Factor, Labels, State, alike, simplified
from cipm_ir.ops.events import Recorder, Uniform

Shape = tuple[int, ...]
Literal = tuple[Array, Array]
"""A constant under the two shape assignments; equal arrays where it does not depend on a dynamic dimension."""


class Seeds(Protocol):
    """How a rule changes the labels that a parameter starts with; implemented by the walk."""

    def grouped(self, node: ir.Node, index: int, axis: int, groups: int) -> Factor | None:
        """Return labels (groups, size) for an axis that means something else in each group of axis 0."""

    def variance(self, node: ir.Node, index: int, epsilon: float) -> bool:
        """Note that a parameter v takes a scale s (and any sign) as s^2 (v + epsilon) - epsilon."""


@dataclass
class OpContext:
    """One node with the states of its inputs; the rule fills in ``outputs``.

    ``shapes`` are the output shapes under the first assignment, ``None`` where unknown; ``pairs`` gives both
    assignments for every input and output, by name. ``varying`` says, by name, which entries of a computed number
    depend on a dynamic size.
    """

    node: ir.Node
    version: int
    inputs: list[State | None]
    shapes: list[Shape | None]
    literals: list[Literal | None]
    rec: Recorder
    second: dict[str, Shape] = field(default_factory=dict)
    varying: dict[str, Array] = field(default_factory=dict)
    seeds: Seeds | None = None
    elementwise: bool = False
    outputs: list[State | None] = field(default_factory=list)

    def attr(self, name: str, default: Any = None) -> Any:
        """Return the value of an attribute of the node."""
        return attribute(self.node, name, default)

    def state(self, index: int) -> State:
        """Return the state of a required input."""
        state = self.inputs[index] if index < len(self.inputs) else None
        if state is None:
            raise UnsupportedPattern(f"input {index} is missing or has no known shape")
        return state

    def optional(self, index: int) -> State | None:
        """Return the state of an input that may be absent."""
        return self.inputs[index] if index < len(self.inputs) and self.has(index) else None

    def has(self, index: int) -> bool:
        """Return whether the node has this input."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def shape(self, index: int = 0) -> Shape:
        """Concrete shape of an output."""
        shape = self.shapes[index]
        if shape is None:
            raise UnsupportedPattern("the shape of the output is not known")
        return shape

    def const(self, index: int) -> Array | None:
        """Return a small constant input, or None where it is not constant or depends on a dynamic dimension."""
        pair = self.literals[index] if index < len(self.literals) else None
        if pair is None or self.varies(index) is not None:
            return None
        return pair[0] if pair[0] is pair[1] or _same(pair[0], pair[1]) else None

    def partly(self, index: int) -> tuple[Array, Array] | None:
        """Return a small computed input, and which of its entries depend on a dynamic size.

        None where it is not known.
        """
        pair = self.literals[index] if index < len(self.literals) else None
        if pair is None or pair[0].shape != pair[1].shape:
            return None
        varies = self.varies(index)
        return pair[0], np.not_equal(*pair) if varies is None else varies | np.not_equal(*pair)

    def varies(self, index: int) -> Array | None:
        """Return which entries of an input that is known as numbers depend on a dynamic size; None where none does."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        return None if value is None else self.varying.get(value.name or "")

    def second_shape(self, value: ir.Value | None) -> Shape | None:
        """Return the shape of a value under the second assignment."""
        return None if value is None else self.second.get(value.name or "")

    # emitting
    def set(
        self, index: int, factors: Iterable[Factor] = (), uniform: Iterable[int] = (), shape: Shape | None = None
    ) -> None:
        """Set the state of an output.

        Args:
            index: number of the output.
            factors: its labels.
            uniform: axes along which all entries are equal wherever they are in the inputs. To name one is to state
                that the operator treats every index of that axis alike.
            shape: concrete shape, where it is not the inferred one.
        """
        while len(self.outputs) <= index:
            self.outputs.append(None)
        self.outputs[index] = State(self.shape(index) if shape is None else shape, tuple(factors), frozenset(uniform))

    def like(self, index: int, state: State, uniform: Iterable[int] = ()) -> None:
        """Set an output to the labels of ``state``, but not to its uniform axes: an operator may tell indices apart.

        Uniform are the axes in ``uniform`` (see `set`), and behind an ``elementwise`` operator those along which none
        of its inputs changes.
        """
        if self.elementwise:
            uniform = alike((s for s in self.inputs if s is not None), state.shape)
        self.set(index, state.factors, uniform, state.shape)

    def pin(self, state: State | None, reason: str) -> None:
        """Pin all that moves in an input; where the other axes of a value go on, see `without`."""
        for factor in () if state is None else state.factors:
            self.rec.pin(factor.labels, reason)
            self.freeze_factor(factor)

    def pin_axes(self, state: State, axes: Iterable[int], reason: str) -> State:
        """Pin what moves along some axes, which are fixed from here on, whatever was uniform along them.

        A joint factor goes on over its other axes, by its blocks there.
        """
        gone = set(axes)
        if not gone & state.uniform and not any(gone & set(f.axes) for f in state.factors):
            return state
        factors = []
        for f in state.factors:
            rest = tuple(a for a in f.axes if a not in gone)
            if len(rest) == len(f.axes):
                factors.append(f)
                continue
            self.rec.pin(self.rec.marginal(f, tuple(a for a in f.axes if a in gone)).labels, reason)
            self.freeze_factor(f)
            if rest:
                factors.append(self.rec.marginal(f, rest))
        return State(state.shape, tuple(factors), state.uniform - gone)

    def normalizes(self, state: State, axes: Iterable[int]) -> None:
        """Note that a statistic is taken along some axes, at each place of the others on its own.

        Of a factor over axes of both kinds, what is summed together moves as a block.
        """
        over = set(axes)
        for f in state.factors:
            if over & set(f.axes):
                self.rec.normalizes(f.labels)
                if rest := tuple(a for a in f.axes if a not in over):
                    self.rec.marginal(f, rest)

    def freeze_factor(self, factor: Factor, *, scale: bool = True, sign: bool = True) -> None:
        """No scaling (no sign) on this factor."""
        self.rec.zero(factor.labels, factor.scale_var, scale=scale, sign=sign)

    def freeze(self, state: State | None, *, scale: bool = True, sign: bool = True) -> None:
        """No scaling (no sign) on any factor of the value."""
        if state is not None:
            for factor in state.factors:
                self.freeze_factor(factor, scale=scale, sign=sign)

    def scaled(self, factor: Factor, coefficient: int, *, sign: bool) -> Factor:
        """Return the factor with the log-scale multiplied by ``coefficient``; the sign kept or ended."""
        var = self.rec.variable()
        self.rec.equate(factor.labels, ((var, 1), (factor.scale_var, -coefficient)), sign=False)
        if sign:
            self.rec.equate(factor.labels, ((var, 1), (factor.scale_var, 1)), scale=False)
        else:
            self.rec.zero(factor.labels, var, scale=False)
        return Factor(factor.axes, factor.labels, var, factor.repeats)

    def simplified(
        self, shape: Sequence[int], labels: Labels, axes: Sequence[int], var: int, repeats: bool
    ) -> Factor | None:
        """As `ir.labels.simplified`; where no axis is left to carry the labels, the one unit that remains is pinned."""
        made = simplified(shape, labels, axes, var, repeats)
        if made is None:
            self.rec.pin(labels, f"{self.node.op_type} takes a single unit")
            self.rec.zero(labels, var)
        return made

    def note_uniform_operand(self, index: int, axis: int, factor: Factor, place: int) -> None:
        """Note that an input meets axis ``place`` of a factor with its own ``axis``, if it is uniform along that."""
        state = self.state(index)
        if axis in state.uniform and state.shape[axis] > 1:
            self.rec.uniforms.append(Uniform(self.rec.node, index, axis, factor, place))

    def unify(self, a: Factor, b: Factor) -> None:
        """Two factors over corresponding axes move together."""
        if a.labels.shape != b.labels.shape:
            raise UnsupportedPattern(f"labels of shapes {a.labels.shape} and {b.labels.shape} cannot be tied")
        self.rec.unify(a.labels, b.labels)

    def grouped(self, index: int, axis: int, groups: int) -> Factor | None:
        """Joint labels (groups, size) for axis ``axis`` of a parameter.

        None where the input is computed, or where another use of the parameter knows nothing of the groups.
        """
        value = self.node.inputs[index]
        if self.seeds is None or value is None:
            return None
        for node, position in value.uses():
            if (position, *_grouping(node)) != (index, *_grouping(self.node)):
                return None
        return self.seeds.grouped(self.node, index, axis, groups)

    def by_row(self, index: int, axis: int) -> State | None:
        """Return the state of a parameter in which ``axis`` means something else at each index of axis 0.

        None where the input is computed, has other uses, or is fixed along one of the two axes.
        """
        state, value = self.state(index), self.node.inputs[index]
        rows, along = state.factor_of(0), state.factor_of(axis)
        if self.seeds is None or value is None or value.is_graph_output():
            return None
        if axis == 0 or rows is None or along is None or len(rows.axes) + len(along.axes) > 2 or len(value.uses()) > 1:
            return None
        made = self.seeds.grouped(self.node, index, axis, state.shape[0])
        if made is None:
            return None
        joint = Factor((0, axis), made.labels, made.scale_var)
        self.unify(self.rec.marginal(joint, (0,)), rows)
        self.freeze_factor(rows)
        rest = [f for f in state.factors if f is not rows and f is not along]
        return State(state.shape, (joint, *rest), state.uniform)

    def split_rows(self) -> None:
        """Let parameters with two axes follow a joint factor of another input, aligned from the right, row by row.

        The bias (expert, unit) of stacked experts: units of each expert have an order of their own.
        """
        for index, mine in enumerate(self.inputs):
            if mine is None or len(mine.factors) != 2 or any(len(f.axes) > 1 for f in mine.factors):
                continue
            axes = {f.axes[0] for f in mine.factors}
            for other in self.inputs if 0 in axes else ():
                shift = 0 if other is None else other.rank - mine.rank
                if other is not None and any({a + shift for a in axes} <= set(f.axes) for f in other.factors):
                    self.inputs[index] = self.by_row(index, max(axes)) or mine
                    break

    def variance(self, index: int, epsilon: float) -> None:
        """The input is a variance with this epsilon; where it is computed it cannot scale."""
        if self.seeds is None or not self.seeds.variance(self.node, index, epsilon):
            self.freeze(self.optional(index))

    def vector(self, index: int, factor: Factor, axis: int = 0) -> Factor | None:
        """Tie a one-axis parameter (bias, gamma) to a factor over one axis; its own factor, or None.

        A parameter without a factor of full size pins the axis.
        """
        state = self.optional(index)
        if state is None:
            return None
        own = state.factor_of(axis)
        if own is None or own.axes != (axis,):
            if not state.broadcasts(axis):
                self.rec.pin(factor.labels, f"input {index} of {self.node.op_type} is fixed along this axis")
                self.pin(state, "mixed axes")
            self.note_uniform_operand(index, axis, factor, factor.axes[-1])
            return None
        self.unify(factor, own)
        return own


def _grouping(node: ir.Node) -> tuple[str, int, str]:
    """By what a node tells groups of rows of its weights apart."""
    return node.op_type, attribute(node, "group", 1), str(attribute(node, "direction", ""))


def _same(a: Array, b: Array) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def fixed(factor: Factor) -> Factor:
    """Return the factor without scale."""
    return Factor(factor.axes, factor.labels, ZERO, factor.repeats)
