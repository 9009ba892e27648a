"""Recurrent layers: LSTM, GRU, RNN. The gates are blocks of one hidden space, so all gate rows of a unit move together.

W is (directions, gates H, inputs), R (directions, gates H, H), B (directions, 2 gates H), P (directions, 3 H). Each
direction has a hidden space of its own: the labels of gate rows are a joint factor over (direction, row), of which the
two directions keep equally many. Where a weight's labels are not apart by direction (it is computed from one for
both), the directions share one permutation. Sigmoid and tanh admit no scaling; a Relu cell is treated alike (coarse,
but sound).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.constants import attribute
from cipm_ir.ir.labels import ZERO, Factor, Labels, State
from cipm_ir.ops.context import OpContext
from cipm_ir.ops.contraction import contract
from cipm_ir.ops.registry import operator
from cipm_ir.ops.resize import Resize

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_WEIGHTS, _LENGTHS, _STATE, _CELL, _PEEPHOLES = (1, 2, 3), 4, 5, 6, 7


def _resize(r: Resize) -> None:
    """The width of the hidden space is an attribute."""
    if r.attr("hidden_size") is not None:
        r.set_attr("hidden_size", r.new(2)[2])


@operator("LSTM", "GRU", "RNN", resize=_resize)
def recurrent(op: OpContext) -> None:
    """One unit: its row in every gate of W, R, B and P, its column of R, its place in the states and outputs."""
    x, weight, again = op.state(0), op.state(1), op.state(2)
    gates, (directions, _, width) = _GATES[op.node.op_type], again.shape
    op.pin(op.optional(_LENGTHS), "sequence lengths")
    x = op.pin_axes(x, (0, 1), f"time or batch of {op.node.op_type}")
    rows, columns = _by_direction(op, 1, 1), _by_direction(op, 2, 2)
    _inputs(op, x, weight)
    if width == 1:
        _fix_directions(op, weight, again)
        _outputs(op, None)
        return
    hidden = _units(op, rows, gates)
    if hidden is None:
        raise UnsupportedPattern("gates that are fixed")
    back = _units(op, _by_direction(op, 2, 1), gates)
    if back is None or columns is None:
        raise UnsupportedPattern("recurrent weights that are fixed or joint")
    op.rec.unify(hidden, back)
    op.rec.unify(hidden, columns.labels)
    op.freeze_factor(columns)
    for index, count in ((3, 2 * gates), (_PEEPHOLES, 3)):
        _along(op, index, 0, hidden, count)
    batch_first = int(bool(op.attr("layout", 0)))
    for index in (_STATE, _CELL):
        _along(op, index, batch_first, hidden, 1)
    _fix_directions(op, weight, again)
    _outputs(op, hidden)
    if directions > 1:  # forward and backward are not exchanged
        op.rec.pin(op.rec.marginal(Factor((0, 1), hidden), (0,)).labels, f"direction of {op.node.op_type}")


def _by_direction(op: OpContext, index: int, axis: int, place: int = 0) -> Factor | None:
    """Return labels (directions, size) of an axis of an input with directions on axis ``place``.

    None where it is fixed.
    """
    state = op.state(index)
    directions = state.shape[place]
    joint = next((f for f in state.factors if f.axes == (place, axis)), None)
    if joint is None and directions > 1 and place == 0:
        joint = op.grouped(index, axis, directions)
    if joint is not None:
        return joint
    own = state.factor_of(axis)
    if own is None or own.axes != (axis,):
        return None
    labels = np.ascontiguousarray(np.broadcast_to(own.labels, (directions, len(own.labels))))
    return Factor((place, axis), labels, own.scale_var, directions > 1)


def _fix_directions(op: OpContext, weight: State, again: State) -> None:
    """No direction is exchanged with the other."""
    for state in (weight, again):
        for f in state.factors:
            if f.axes == (0,):
                op.pin(State(state.shape, (f,)), f"direction of {op.node.op_type}")


def _inputs(op: OpContext, x: State, weight: State) -> None:
    """Contract the input with W; the gate rows admit no scale."""
    columns = tuple(f for f in weight.factors if f.axes == (2,))
    for f in weight.factors:
        if 2 in f.axes and len(f.axes) > 1:
            raise UnsupportedPattern("input weights whose columns are joint")
    shape = (*x.shape[:2], *weight.shape[:2])
    local = replace(op, shapes=[shape])
    named = [("t", "n", "i"), ("d", "r", "i")]
    contract(local, [x, replace(weight, factors=columns)], named, ("t", "n", "d", "r"), (0, 1))


def _units(op: OpContext, rows: Factor | None, count: int) -> Labels | None:
    """Return labels (directions, hidden) of an axis that holds ``count`` gates after each other, which are tied."""
    if rows is None:
        return None
    op.freeze_factor(rows)
    table = rows.labels.reshape(len(rows.labels), count, -1)
    for k in range(1, count):
        op.rec.unify(table[:, 0], table[:, k])
    return np.ascontiguousarray(table[:, 0])


def _along(op: OpContext, index: int, place: int, hidden: Labels, count: int) -> None:
    """Tie the last axis of an optional input, which holds ``count`` vectors of hidden units for each direction."""
    state = op.optional(index)
    if state is None:
        return
    last = state.rank - 1
    op.freeze(state)
    table = _units(op, _by_direction(op, index, last, place), count)
    covered = {last} if table is None else {a for f in state.factors if last in f.axes for a in f.axes}
    rest = State(state.shape, tuple(f for f in state.factors if not covered & set(f.axes)))
    op.pin(rest, f"batch or direction of {op.node.op_type}")
    if table is not None:
        op.rec.unify(hidden, table)
    elif not state.broadcasts(last) or count > 1:  # gates of a uniform axis cannot follow units that are removed
        op.rec.pin(hidden, f"input {index} of {op.node.op_type} is fixed along the hidden axis")
        op.pin(state, "mixed axes")
    else:
        op.note_uniform_operand(index, last, Factor((0, last), hidden, ZERO), last)


def _outputs(op: OpContext, hidden: Labels | None) -> None:
    """The hidden axis is the last of every output."""
    batch_first = int(bool(op.attr("layout", 0)))
    for k, value in enumerate(op.node.outputs):
        if not value.name or op.shapes[k] is None:
            continue
        last, place = len(op.shape(k)) - 1, (2 if batch_first else 1) if k == 0 else batch_first
        if hidden is None:
            op.set(k)
        elif len(hidden) == 1:
            op.set(k, [Factor((last,), hidden[0], ZERO)])
        else:
            op.set(k, [Factor((place, last), hidden, ZERO)])


def stacked(node: ir.Node) -> bool:
    """Return whether a Concat only puts the weights of the directions of recurrent layers on top of each other."""
    uses = list(node.outputs[0].uses())
    if attribute(node, "axis", 0) != 0 or not uses or node.outputs[0].is_graph_output():
        return False
    return all(use.node.op_type in _GATES and not use.node.domain and use.idx in _WEIGHTS for use in uses)


def on_top(op: OpContext, states: Sequence[State]) -> State | None:
    """Return the state of such a Concat: each direction keeps its labels, in factors that share the axis of the
    direction.

    They overlap, which no other operator has to handle: only recurrent layers take such a value. None where the parts
    are not labelled alike.
    """
    if any(s.shape[0] != 1 for s in states):
        return None
    factors = []
    for axis in range(1, states[0].rank):
        parts = [s.factor_of(axis) for s in states]
        if all(p is None for p in parts):
            continue
        plain = [p for p in parts if p is not None and p.axes == (axis,)]
        if len(plain) < len(parts):
            return None
        if axis == 2 and next(iter(op.node.outputs[0].uses())).idx == 1:  # both directions take the same inputs
            for p in plain[1:]:
                op.rec.unify(plain[0].labels, p.labels)
                op.rec.same(p.labels, plain[0].scale_var, p.scale_var)
            factors.append(plain[0])
            continue
        for p in plain:
            op.freeze_factor(p)
        labels = np.stack([p.labels for p in plain])
        factors.append(Factor((0, axis), labels, ZERO, len(np.unique(labels)) < labels.size))
    return State(op.shape(), tuple(factors))
