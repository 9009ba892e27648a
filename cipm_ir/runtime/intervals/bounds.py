"""Bounds of every value of a graph, per labelled position: what an analysis may rely on without data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.constants import constant_tensor
from cipm_ir.ir.labels import Array, Factor, State
from cipm_ir.ir.parameters import parameters
from cipm_ir.ops.registry import entry_of
from cipm_ir.runtime.intervals import (
    elementwise as interval_elementwise,
)
from cipm_ir.runtime.intervals import (
    linear as interval_linear,
)
from cipm_ir.runtime.intervals import (
    moves as interval_moves,
)
from cipm_ir.runtime.intervals.arithmetic import REAL, Bounds, Interval, Precision, precision_of
from cipm_ir.runtime.intervals.site import Site, rule_of
from cipm_ir.symmetry.analysis import Analysis

RULES = (interval_elementwise, interval_linear, interval_moves)
"""Imported for what they register."""
_IN_BLOCKS = {"MatMul", "Gemm", "Conv", "ConvTranspose"}


@dataclass
class Intervals:
    """Bounds of values (by name) and parameters, as long as no value of a run overflows or is not a number.

    Arrays have the rank of the value; positions that carry no labels (batch, space, time) share one bound.
    """

    analysis: Analysis
    values: dict[str, Interval] = field(default_factory=dict)
    parameters: dict[str, ir.TensorProtocol | None] = field(default_factory=dict)
    """None for what a caller may override."""
    fixed: set[str] = field(default_factory=set)
    """Names of values that are known not to depend on what a caller may feed, but for sizes."""
    _last: tuple[str, Array | None] = ("", None)

    def parameter(self, name: str) -> Array | None:
        """Stored array of a parameter; the last one read is at hand."""
        if self._last[0] != name:
            tensor = self.parameters.get(name)
            known = tensor is not None and tensor.dtype != ir.DataType.STRING
            self._last = (name, np.asarray(tensor.numpy()) if known and tensor is not None else None)
        return self._last[1]

    def operand(self, position: int, index: int) -> Interval | None:
        """Bounds of an input of a node; None where it is left out or unknown."""
        value = self.analysis.walk.nodes[position].inputs[index]
        name = "" if value is None else value.name or ""
        if name in self.parameters:
            array = self.parameter(name)
            rank = len(self.state(position, index).shape)
            narrow = index == 1 and self.analysis.walk.nodes[position].op_type in _IN_BLOCKS
            return Interval.unbounded(rank) if array is None else Interval.point(array, wide=not narrow)
        return self.values.get(name)

    def state(self, position: int, index: int) -> State:
        """Shape and labels of an input of a node."""
        walk = self.analysis.walk
        value = walk.nodes[position].inputs[index]
        name = "" if value is None else value.name or ""
        return walk.input_state(position, index) or State(walk.shapes.first.get(name, ()))


def along(bounds: Interval, factor: Factor) -> tuple[Bounds, Bounds]:
    """Bounds for each label of a factor of the value (in the shape of its labels)."""
    rest = [a for a in range(bounds.rank) if a not in factor.axes]
    merged = bounds.merged(rest)
    ends = (e.squeeze(tuple(rest)) for e in (merged.lo, merged.hi))
    low, high = (np.asarray(np.broadcast_to(e, factor.labels.shape)) for e in ends)
    return low, high


def find_intervals(
    model: ir.Model,
    analysis: Analysis,
    inputs: Mapping[str, tuple[float, float]] | None = None,
    *,
    rounding: bool = True,
) -> Intervals:
    """Bounds for every value of an analysed model.

    Args:
        model: the model that was analysed.
        analysis: its analysis.
        inputs: bounds of graph inputs by name; the others are unbounded.
        rounding: widen by what a run in the element types of the values may round; without, real arithmetic.
    """
    found = Intervals(analysis)
    for name, value in parameters(model.graph).items():
        found.parameters[name] = value.const_value
    for value in model.graph.inputs:
        name = value.name or ""
        state = analysis.walk.states.get(name)
        if name in found.parameters or state is None:
            continue
        low, high = (inputs or {}).get(name, (-np.inf, np.inf))
        shape = (1,) * state.rank
        found.values[name] = Interval.of(np.full(shape, low), np.full(shape, high))
    for position in range(len(analysis.walk.nodes)):
        _visit(found, position, rounding)
    return found


def _visit(found: Intervals, position: int, rounding: bool) -> None:
    walk = found.analysis.walk
    node = walk.nodes[position]
    names = [v.name or "" for v in node.outputs]
    if node.op_type == "Constant" and not node.domain:
        found.parameters[names[0]] = constant_tensor(node)
        return
    literal = _literal(found, node, names[0]) if len(names) == 1 else None
    if literal is not None:
        if names[0] in walk.states:
            found.values[names[0]] = Interval.point(literal)
        else:  # a ConstantOfShape is a parameter
            found.parameters[names[0]] = ir.tensor(literal)
        return
    made = _bounded(found, position, rounding)
    for k, name in enumerate(names):
        state = walk.states.get(name)
        if name and state is not None:
            found.values[name] = _settled(made[k], state)
        elif name and node.op_type == "ConstantOfShape":
            found.parameters[name] = _fill(node, walk.shapes.first.get(name, ()))


def _literal(found: Intervals, node: ir.Node, name: str) -> Array | None:
    """A constant that was followed as a number, unless a dynamic size or what a caller may override enters it."""
    number = found.analysis.walk.constant(name)
    if number is None or number.dtype.kind not in "iufb":
        return None
    return None if any(_overridable(found, v) for v in node.inputs) else number


def _overridable(found: Intervals, value: ir.Value | None) -> bool:
    """Whether a value is not a number known here; what was followed is a point."""
    todo, seen = [value], set[str]()
    while todo:
        one = todo.pop()
        name = "" if one is None else one.name or ""
        if one is None or name in seen or name in found.fixed:
            continue
        seen.add(name)
        if name in found.parameters:
            if found.parameters[name] is None:
                return True
        elif name not in found.values or not found.values[name].known:
            node = one.producer()
            if node is None:
                return True
            if not entry_of(node).sizes_only:
                todo.extend(node.inputs)
    found.fixed |= seen
    return False


def _fill(node: ir.Node, shape: tuple[int, ...]) -> ir.TensorProtocol:
    attr = node.attributes.get("value")
    array = np.zeros(1, np.float32) if attr is None else attr.as_tensor().numpy()
    return ir.tensor(np.broadcast_to(array.reshape(()), shape))


def _bounded(found: Intervals, position: int, rounding: bool) -> list[Interval | None]:
    """Bounds of the outputs from the operator's rule; None where there is none, or its premises do not hold."""
    walk = found.analysis.walk
    node = walk.nodes[position]
    none: list[Interval | None] = [None] * len(node.outputs)
    rule = rule_of(node)
    given = [k for k, v in enumerate(node.inputs) if v is not None]
    operands = {k: found.operand(position, k) for k in given}
    if rule is None or not given or any(operands[k] is None for k in given):
        return none
    if any(v.name and v.name not in walk.states for v in node.outputs):  # of unknown shape
        return none
    out = rule(_site(found, position, operands, rounding))
    if out is None:
        return none
    return out if isinstance(out, list) else [out, *none[1:]]


def _site(found: Intervals, position: int, operands: dict[int, Interval | None], rounding: bool) -> Site:
    walk = found.analysis.walk
    node = walk.nodes[position]
    count = len(node.inputs)
    states: list[State | None] = [None] * count
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())] * count
    literals: list[Array | None] = [None] * count
    for k in operands:
        value = node.inputs[k]
        name = "" if value is None else value.name or ""
        states[k] = state = found.state(position, k)
        shapes[k] = (
            state.shape,
            state.shape if name in found.parameters else walk.shapes.second.get(name, state.shape),
        )
        literals[k] = walk.constant(name)
    dtype = node.outputs[0].dtype or walk.shapes.types.get(node.outputs[0].name or "")
    outs = [None if v.name not in walk.states else walk.states[v.name].shape for v in node.outputs]
    version = node.version or _opset(node)
    precision: Precision = precision_of(dtype) if rounding else REAL
    raws: list[Any] = [None] * count
    for k in operands:
        value = node.inputs[k]
        if node.op_type == "Gather" and value is not None and value.name in found.parameters:
            raws[k] = found.parameter(value.name)
    inputs = [operands.get(k) for k in range(count)]
    return Site(node, version, inputs, states, raws, literals, shapes, outs, precision)


def _opset(node: ir.Node) -> int:
    graph = node.graph
    imports = graph.opset_imports if isinstance(graph, ir.Graph) else {}
    return int(imports.get(node.domain, 1))


def _settled(made: Interval | None, state: State) -> Interval:
    """One bound along axes without labels; nothing known where the bounds do not fit the value."""
    if made is None or made.rank > state.rank:
        return Interval.unbounded(state.rank)
    x = made.map(lambda e: e.reshape((1,) * (state.rank - e.ndim) + e.shape))
    labelled = {a for f in state.factors for a in f.axes}
    x = x.merged(a for a in range(state.rank) if a not in labelled)
    if any(n not in (1, size) for n, size in zip(x.shape, state.shape, strict=True)):
        return Interval.unbounded(state.rank)
    return x
