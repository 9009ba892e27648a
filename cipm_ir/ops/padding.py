"""Pad and Tile: the label array is padded with fresh atoms, or repeated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.labels import Array, Factor, State
from cipm_ir.ops.context import OpContext, fixed
from cipm_ir.ops.registry import operator
from cipm_ir.ops.resize import Resize

Attributes = Callable[[str], Any]


def _pads(version: int, attr: Attributes, inputs: Sequence[Array | None], rank: int) -> list[tuple[int, int]] | None:
    """(before, after) per axis."""
    if version < 11:
        flat, axes = attr("pads"), None
    else:
        flat, axes = (None if v is None else v.ravel().tolist() for v in inputs)
    if flat is None:
        return None
    axes = list(range(rank)) if axes is None else [int(a) % rank for a in axes]
    out = [(0, 0)] * rank
    for k, a in enumerate(axes):
        out[a] = (int(flat[k]), int(flat[k + len(axes)]))
    return out


def _resize_pad(r: Resize) -> None:
    rank = len(r.old(0))
    pads = _pads(r.version, r.attr, [r.literal(1), r.literal(3)], rank)
    if pads is None or r.old_out(0) == r.new_out(0):
        return
    given = None if r.version < 11 else r.literal(3)
    axes = list(range(rank)) if given is None else [int(a) % rank for a in given.ravel()]
    before, after = [], []
    for a in axes:
        lo, hi = pads[a]
        if r.old_out(0)[a] != r.new_out(0)[a]:
            kept = r.kept_out(0, a)
            lo, hi = int((kept < lo).sum()), int((kept >= lo + r.old(0)[a]).sum())
        before.append(lo)
        after.append(hi)
    if r.version < 11:
        r.set_attr("pads", before + after)
    else:
        r.set_literal(1, np.asarray(before + after, np.int64))


@operator("Pad", resize=_resize_pad, literals=(1,), positionwise=True, free=True, pads=lambda node: True)
def pad(op: OpContext) -> None:
    """Padding inserts free atoms: equal values move with anything, and zeros scale with anything."""
    state, shape = op.state(0), op.shape()
    mode = op.attr("mode", "constant")
    for k in (1, 2, 3):
        op.pin(op.optional(k), "argument of Pad")
    value = np.asarray(op.attr("value", 0.0)) if op.version < 11 else (op.const(2) if op.has(2) else np.zeros(()))
    zero = value is not None and not value.any()
    pads = (
        _pads(op.version, op.attr, [op.const(1), op.const(3)], state.rank)
        if op.version < 11 or op.const(1) is not None
        else None
    )
    if pads is None:
        computed, pads = _computed_pads(op, state, shape)
        state = op.pin_axes(state, computed, "Pad by a computed amount")
    if mode not in ("constant", b"constant"):
        padded = [k for k in range(state.rank) if pads[k] != (0, 0)]
        state = op.pin_axes(state, padded, f"Pad in mode {mode}")
    factors: list[Factor] = []
    for f in state.factors:
        hit = [x for x in f.axes if pads[x] != (0, 0)]
        g = f
        if any(pads[x] != (0, 0) for x in range(state.rank)) and not zero:
            op.freeze_factor(f)
            g = fixed(f)
        if len(hit) > 1:
            factors.extend(op.pin_axes(State(state.shape, (f,)), hit, "Pad of a joint factor").factors)
            continue
        if hit:
            if min(pads[hit[0]]) < 0:
                raise UnsupportedPattern("Pad by a negative amount")
            k = g.axes.index(hit[0])
            own = op.rec.fresh(*g.labels.shape[:k], sum(pads[hit[0]]), *g.labels.shape[k + 1 :])
            before, after = np.split(own, [pads[hit[0]][0]], axis=k)
            g = Factor(g.axes, np.concatenate([before, g.labels, after], axis=k), g.scale_var, g.repeats)
        factors.append(g)
    op.set(0, factors, [x for x in state.uniform if pads[x] == (0, 0)])


def _computed_pads(op: OpContext, state: State, shape: tuple[int, ...]) -> tuple[list[int], list[tuple[int, int]]]:
    """Return axes that are padded by what depends on a dynamic size, and (before, after) per axis.

    Not zero along those.
    """
    known, axes = op.partly(1), op.const(3) if op.has(3) else np.arange(state.rank)
    if known is None or axes is None:  # only axes that keep their size under both assignments can be known
        a, b = op.second_shape(op.node.inputs[0]), op.second_shape(op.node.outputs[0])
        keeps = [a is not None and b is not None and a[k] == b[k] for k in range(state.rank)]
        changed = [k for k in range(state.rank) if state.shape[k] != shape[k] or not keeps[k]]
        return changed, [(1, 1) if k in changed else (0, 0) for k in range(state.rank)]
    amounts, varies = (x.reshape(2, -1).T for x in known)
    pads = [(0, 0)] * state.rank
    computed = []
    for axis, amount, changes in zip(axes.ravel() % state.rank, amounts, varies, strict=True):
        pads[axis] = (1, 1) if changes.any() else (int(amount[0]), int(amount[1]))
        computed += [int(axis)] if changes.any() else []
    return computed, pads


@operator("Tile", moves=True)
def tile(op: OpContext) -> None:
    """Repeats the labels; along an axis of size 1 the result is uniform."""
    state, shape = op.state(0), op.shape()
    op.pin(op.optional(1), "repeats of Tile")
    varies = op.varies(1)
    if varies is not None:
        state = op.pin_axes(state, np.flatnonzero(varies).tolist(), "Tile by a computed number")
    factors = []
    for f in state.factors:
        labels, repeats = f.labels, f.repeats
        for k, a in enumerate(f.axes):
            times = shape[a] // state.shape[a]
            if times > 1:
                labels = np.concatenate([labels] * times, axis=k)
                repeats = True
        factors.append(Factor(f.axes, labels, f.scale_var, repeats))
    grown = [a for a in range(state.rank) if state.shape[a] == 1 < shape[a]]
    op.set(0, factors, [*state.uniform, *grown])
