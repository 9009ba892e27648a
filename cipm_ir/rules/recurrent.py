"""Recurrent layers: LSTM, GRU, RNN. The gates are blocks of one hidden space, so all gate rows of a unit move together.

W is (directions, gates H, inputs), R (directions, gates H, H), B (directions, 2 gates H), P (directions, 3 H). Both
directions share one permutation: the axis of a parameter has one set of labels, whatever the index of the direction.
Sigmoid and tanh admit no scaling; a Relu cell is treated alike (coarse, but sound).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cipm_ir.ir.labels import ZERO, Factor, Labels, State
from cipm_ir.rules.context import OpContext
from cipm_ir.rules.contraction import contract
from cipm_ir.rules.registry import Opaque, operator
from cipm_ir.rules.resize import Resize

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_LENGTHS, _STATE, _CELL, _PEEPHOLES = 4, 5, 6, 7


def _resize(r: Resize) -> None:
    """The width of the hidden space is an attribute."""
    if r.attr("hidden_size") is not None:
        r.set_attr("hidden_size", r.new(2)[2])


@operator("LSTM", "GRU", "RNN", resize=_resize)
def recurrent(op: OpContext) -> None:
    """One unit: its row in every gate of W, R, B and P, its column of R, its place in the states and outputs."""
    x, weight, again = op.state(0), op.state(1), op.state(2)
    gates, width = _GATES[op.node.op_type], again.shape[2]
    op.pin(op.optional(_LENGTHS), "sequence lengths")
    reason = f"time, batch or direction of {op.node.op_type}"
    x, weight, again = (op.without(s, axes, reason) for s, axes in ((x, (0, 1)), (weight, (0,)), (again, (0,))))
    gate_rows = _inputs(op, x, weight)
    if width == 1:
        _outputs(op, None)
        return
    hidden = _rows(op, gate_rows, gates)
    if hidden is None:
        raise Opaque("gates that are fixed")
    rows, columns = _rows(op, again.factor_of(1), gates), again.factor_of(2)
    if rows is None or columns is None or columns.axes != (2,):
        raise Opaque("recurrent weights that are fixed or joint")
    op.rec.unify(hidden, rows)
    op.rec.unify(hidden, columns.labels)
    op.freeze(again)
    for index, count in ((3, 2 * gates), (_PEEPHOLES, 3)):
        _along(op, index, hidden, count)
    for index in (_STATE, _CELL):
        _along(op, index, hidden, 1)
    _outputs(op, hidden)


def _inputs(op: OpContext, x: State, weight: State) -> Factor | None:
    """Contract the input with W; the factor of the gate rows."""
    shape = (*x.shape[:2], *weight.shape[:2])
    local = replace(op, shapes=[shape])
    out = contract(local, [x, weight], [("t", "n", "i"), ("d", "r", "i")], ("t", "n", "d", "r"), (0, 1))
    rows = out.factor_of(3)
    if rows is not None:
        if rows.axes != (3,):
            raise Opaque("gate rows that move with something else")
        op.freeze_factor(rows)
    return rows


def _rows(op: OpContext, rows: Factor | None, count: int) -> Labels | None:
    """Labels of the hidden units of an axis that holds ``count`` gates after each other, which are tied."""
    if rows is None or len(rows.axes) != 1:
        return None
    table = rows.labels.reshape(count, -1)
    for k in range(1, count):
        op.rec.unify(table[0], table[k])
    return np.asarray(table[0])


def _along(op: OpContext, index: int, hidden: Labels, count: int) -> None:
    """Tie the last axis of an optional input, which holds ``count`` vectors of hidden units."""
    state = op.optional(index)
    if state is None:
        return
    last = state.rank - 1
    op.freeze(state)
    state = op.without(state, range(last), f"batch or direction of {op.node.op_type}")
    own = state.factor_of(last)
    if own is not None and own.axes == (last,):
        table = _rows(op, own, count)
        if table is not None:
            op.rec.unify(hidden, table)
    elif not state.broadcasts(last) or count > 1:  # gates of a uniform axis could not follow units that go
        op.rec.pin(hidden, f"input {index} of {op.node.op_type} is fixed along the hidden axis")
        op.pin(state, "mixed axes")
    else:
        op.meets(index, last, Factor((last,), hidden, ZERO), last)


def _outputs(op: OpContext, hidden: Labels | None) -> None:
    """The hidden axis is the last of every output."""
    for k, value in enumerate(op.node.outputs):
        if value.name and op.shapes[k] is not None:
            last = len(op.shape(k)) - 1
            op.set(k, () if hidden is None else [Factor((last,), hidden, ZERO)])
