"""Index-like operators: the operation itself, applied to the label array."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.constants import slice_positions
from cipm_ir.ir.labels import Array, Factor, Labels, State
from cipm_ir.ops.context import OpContext
from cipm_ir.ops.recurrent import on_top, stacked
from cipm_ir.ops.registry import operator
from cipm_ir.ops.resize import Resize

Attributes = Callable[[str], Any]
_FAR = 2**62
"""Beyond the ends of every axis."""


def taken(op: OpContext, f: Factor, axis: int, index: Labels) -> Factor | None:
    """Return the factor after selecting positions (1-d ``index``) along one of its axes."""
    if not len(index):
        return None
    k = f.axes.index(axis)
    labels = f.labels.take(index, axis=k)
    partial = len(index) < f.labels.shape[k]
    repeats = len(np.unique(index)) < len(index)
    ordered = bool((np.diff(index) > 0).all())
    if (f.repeats and not (ordered and not partial)) or (repeats and not f.repeats):
        position = np.arange(f.labels.size).reshape(f.labels.shape).take(index, axis=k)
        op.rec.reindexed(f.labels, labels, position)
    if partial or repeats:
        op.rec.distinguish(labels)
    shape = {a: labels.shape[j] for j, a in enumerate(f.axes)}
    sizes = [shape.get(a, 1) for a in range(max(f.axes) + 1)]
    return op.simplified(sizes, labels, f.axes, f.scale_var, f.repeats or repeats)


def select(op: OpContext, state: State, axis: int, index: Labels, shape: tuple[int, ...]) -> State:
    """Return state after selecting positions along one axis, which stays."""
    factors = []
    for f in state.factors:
        g = taken(op, f, axis, index) if axis in f.axes else f
        if g is not None:
            factors.append(g)
    return State(shape, tuple(factors), frozenset(a for a in state.uniform if shape[a] > 1))


# ---------------------------------------------------------------- Slice
def _bounds(
    version: int, attr: Attributes, inputs: Sequence[Array | None], rank: int
) -> list[tuple[int, int, int, int]] | None:
    if version < 10:
        starts, ends, axes = (attr(name) for name in ("starts", "ends", "axes"))
        steps = None
    else:
        starts, ends, axes, steps = (None if v is None else v.ravel().tolist() for v in inputs)
    if starts is None or ends is None:
        return None
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    return [(int(a) % rank, int(s), int(e), int(d)) for a, s, e, d in zip(axes, starts, ends, steps, strict=True)]


def _resize_slice(r: Resize) -> None:
    rank = len(r.old(0))
    inputs = [r.literal(k) for k in range(1, 5)]
    bounds = _bounds(r.version, r.attr, inputs, rank)
    moved = [a for a in range(rank) if r.old(0)[a] != r.new(0)[a]]
    if bounds is None or not moved:
        return
    starts, ends = [b[1] for b in bounds], [b[2] for b in bounds]
    for j, (axis, start, end, step) in enumerate(bounds):
        if axis not in moved:
            continue
        old = slice_positions(r.old(0)[axis], start, end, step)
        if not len(old):
            continue  # empty before, and of a shorter axis all the more
        kept = r.kept(0, axis)
        rank_of = np.full(r.old(0)[axis], -1)
        rank_of[kept] = np.arange(len(kept))
        new = rank_of[old]
        new = new[new >= 0]
        steps = np.diff(new)
        if len(new) == 0:
            raise UnsupportedPattern("a slice whose elements are all removed")
        if len(new) > 1 and not (steps == step).all():
            if len(bounds) > 1:
                raise UnsupportedPattern("a strided slice over several axes whose elements are removed unevenly")
            r.replace("Gather", [r.node.inputs[0], None], {1: new.astype(np.int64)}, {"axis": axis})
            return
        starts[j] = int(new[0])
        stop = int(new[-1]) + (1 if step > 0 else -1)
        ends[j] = stop if stop >= 0 else -_FAR
    if r.version < 10:
        r.set_attr("starts", starts)
        r.set_attr("ends", ends)
    else:
        for index, values in ((1, starts), (2, ends)):
            kind = np.int64 if (given := inputs[index - 1]) is None else given.dtype
            r.set_literal(index, np.clip(values, np.iinfo(kind).min, np.iinfo(kind).max).astype(kind))


@operator("Slice", resize=_resize_slice, literals=(1, 2), moves=True)
def slice_(op: OpContext) -> None:
    """Constant bounds select labels; bounds that are computed may only touch fixed axes."""
    state = op.state(0)
    for k in range(1, len(op.node.inputs)):
        op.pin(op.optional(k), "bound of Slice")
    bounds = _bounds(op.version, op.attr, [op.const(k) for k in range(1, 5)], state.rank) if _known(op) else None
    if bounds is None:
        axes = op.const(3)
        touched = range(state.rank) if axes is None else [int(a) % state.rank for a in axes.ravel()]
        op.set(0, op.pin_axes(state, touched, "Slice with computed bounds").factors, state.uniform)
        return
    current = state
    for axis, start, end, step in bounds:
        size = current.shape[axis]
        index = slice_positions(size, start, end, step)
        if len(index) == size and step == 1:
            continue
        sizes = tuple(len(index) if a == axis else n for a, n in enumerate(current.shape))
        current = select(op, current, axis, index, sizes)
    op.set(0, current.factors, current.uniform)


def _known(op: OpContext) -> bool:
    return op.version < 10 or all(op.const(k) is not None for k in range(1, 5) if op.has(k))


# ---------------------------------------------------------------- Split, Concat
def _resize_split(r: Resize) -> None:
    axis = int(r.attr("axis", 0)) % len(r.old(0))
    if r.old(0)[axis] == r.new(0)[axis]:
        return
    sizes = [r.new_out(k)[axis] for k in range(len(r.node.outputs))]
    if 0 in sizes:
        raise UnsupportedPattern("a part of a Split whose elements are all removed")
    if r.version < 13:
        r.set_attr("split", sizes)
    else:
        r.set_attr("num_outputs", None)
        r.set_literal(1, np.asarray(sizes, np.int64))


@operator("Split", resize=_resize_split, literals=(1,), moves=True)
def split(op: OpContext) -> None:
    """Consecutive runs along an axis."""
    state = op.state(0)
    op.pin(op.optional(1), "sizes of Split")
    axis = int(op.attr("axis", 0)) % state.rank
    if op.varies(1) is not None:
        state = op.pin_axes(state, [axis], "Split into computed sizes")
    at = 0
    for k in range(len(op.node.outputs)):
        shape = op.shape(k)
        index = np.arange(at, at + shape[axis])
        at += shape[axis]
        part = select(op, state, axis, index, shape) if len(index) < state.shape[axis] else state
        op.like(k, part, part.uniform)


@operator("Concat", moves=True)
def concat(op: OpContext) -> None:
    """Labels follow each other; each part keeps its own scale equation."""
    states = [op.state(k) for k in range(len(op.node.inputs))]
    made = on_top(op, states) if stacked(op.node) else None
    if made is None:
        made = joined(op, states, int(op.attr("axis", 0)) % states[0].rank, op.shape())
    op.like(0, made, made.uniform)


def joined(op: OpContext, states: Sequence[State], axis: int, shape: tuple[int, ...]) -> State:
    """Return the state of a concatenation along ``axis``."""
    rec = op.rec
    if len(states) == 1:
        return states[0]
    along = [next((f for f in s.factors if axis in f.axes), None) for s in states]
    axes = {f.axes for f in along if f is not None}
    factors: list[Factor] = []
    if len(axes) > 1 or (axes - {(axis,)} and not all(f is not None for f in along)):
        touched = {a for some in axes for a in some}
        states = [op.pin_axes(s, touched, "Concat of parts labelled over different axes") for s in states]
        along, axes = [None] * len(states), set()
    if len(axes) == 1 and all(f is not None for f in along):
        parts = [f for f in along if f is not None]
        labels = np.concatenate([f.labels for f in parts], axis=parts[0].axes.index(axis))
        shared = {f.scale_var for f in parts}
        var = parts[0].scale_var if len(shared) == 1 else rec.variable()
        if len(shared) > 1:
            for f in parts:
                rec.same(f.labels, var, f.scale_var)
        repeats = any(f.repeats for f in parts) or len(np.unique(labels)) < labels.size
        factors.append(Factor(parts[0].axes, labels, var, repeats))
    elif axes:
        factors.extend(_mixed(op, states, along, axis, shape))
    rest = [f for s in states for f in s.factors if axis not in f.axes]
    for f in rest:
        same = [g for g in factors if set(g.axes) & set(f.axes)]
        if not same:
            factors.append(f)
        elif same[0].axes == f.axes:
            rec.unify(f.labels, same[0].labels)
            rec.same(f.labels, f.scale_var, same[0].scale_var)
        else:  # nested: the finer goes on
            g = same[0]
            common = tuple(a for a in f.axes if a in g.axes)
            if len(same) > 1 or len(common) < min(len(f.axes), len(g.axes)):
                raise UnsupportedPattern("Concat of parts labelled over overlapping axes")
            rec.unify(rec.marginal(f, common).labels, rec.marginal(g, common).labels)
            op.freeze_factor(f)
            op.freeze_factor(g)
            if len(f.axes) > len(g.axes):
                factors[factors.index(g)] = f
    for index, s in enumerate(states):  # a part that is fixed where another moves
        for f in list(factors):
            for a in f.axes:
                if a != axis and s.factor_of(a) is None:
                    op.note_uniform_operand(index, a, f, a)
            blind = tuple(
                a for a in f.axes if a != axis and s.factor_of(a) is None and (s.shape[a] > 1 or shape[a] > 1)
            )
            if blind and not all(a in s.uniform for a in blind):
                rec.pin(rec.marginal(f, blind).labels, "Concat with a value that is fixed along this axis")
                if blind == f.axes:
                    factors.remove(f)
            elif blind:
                op.freeze_factor(f)
    uniform = [a for a in range(len(shape)) if a != axis and all(s.broadcasts(a) for s in states) and shape[a] > 1]
    return State(shape, tuple(factors), frozenset(uniform))


def _mixed(
    op: OpContext, states: Sequence[State], along: Sequence[Factor | None], axis: int, shape: tuple[int, ...]
) -> list[Factor]:
    """Labelled and fixed parts: fixed ones get pinned atoms of their own."""
    rec = op.rec
    var = rec.variable()
    pieces = []
    for index, (s, f) in enumerate(zip(states, along, strict=True)):
        if f is not None:
            rec.same(f.labels, var, f.scale_var)
            pieces.append(f.labels)
        else:
            own = rec.fresh(s.shape[axis])
            op.note_uniform_operand(index, axis, Factor((axis,), own), axis)
            if not s.broadcasts(axis) or s.shape[axis] == 1:
                rec.pin(own, "Concat with a fixed part")
            rec.zero(own, var)
            pieces.append(own)
    return [Factor((axis,), np.concatenate(pieces), var, any(f is not None and f.repeats for f in along))]


# ---------------------------------------------------------------- Gather
def _resize_gather(r: Resize) -> None:
    axis = int(r.attr("axis", 0)) % len(r.old(0))
    index = r.literal(1)
    fewer = index is not None and index.ndim == 1 and r.old_out(0)[axis] != r.new_out(0)[axis]
    if index is None or (r.old(0)[axis] == r.new(0)[axis] and not fewer):
        return
    kept = r.kept(0, axis)
    rank_of = np.full(r.old(0)[axis], -1)
    rank_of[kept] = np.arange(len(kept))
    new = rank_of[index % r.old(0)[axis]]
    if fewer:
        new = new[r.kept_out(0, axis)]
    if (new < 0).any() or not new.size:
        raise UnsupportedPattern("a Gather whose elements are removed unevenly")
    r.set_literal(1, new.astype(index.dtype))


@operator("Gather", resize=_resize_gather, literals=(1,), moves=True)
def gather(op: OpContext) -> None:
    """A constant index selects labels; indices from outside pin the table's rows and let its columns pass."""
    state, indices, shape = op.state(0), op.state(1), op.shape()
    axis = int(op.attr("axis", 0)) % state.rank
    index = op.const(1)
    d = indices.rank
    op.pin(indices, "index of Gather")
    place = {a: a if a < axis else a + d - 1 for a in range(state.rank) if a != axis}
    uniform = [place[a] for a in state.uniform if a != axis]
    factors = []
    for f in state.factors:
        if axis not in f.axes:
            factors.append(f.moved(place))
        elif index is None:
            rest = op.pin_axes(State(state.shape, (f,)), [axis], "rows of Gather chosen at run time")
            factors.extend(g.moved(place) for g in rest.factors)
        else:
            flat = index.ravel().astype(np.int64) % state.shape[axis]
            times = np.bincount(flat, minlength=state.shape[axis])
            if d == 1 and not f.repeats and times[0] > 1 and (times == times[0]).all():  # key heads for query heads
                labels = f.labels.take(flat, axis=f.axes.index(axis))
                factors.append(Factor(f.axes, op.rec.copied(labels), f.scale_var).moved({**place, axis: axis}))
                continue
            g = taken(op, f, axis, flat)
            if g is None:
                continue
            if axis not in g.axes:
                factors.append(g.moved(place))
            elif d == 1:
                factors.append(g.moved({**place, axis: axis}))
            elif (spread := _spread(op, g, axis, index.shape, place, shape)) is not None:
                factors.append(spread)
    if axis in state.uniform:
        uniform += list(range(axis, axis + d))
    op.set(0, sorted(factors, key=lambda f: f.axes), uniform)


def _spread(
    op: OpContext, f: Factor, axis: int, dims: tuple[int, ...], place: dict[int, int], shape: tuple[int, ...]
) -> Factor | None:
    k = f.axes.index(axis)
    labels = f.labels.reshape(f.labels.shape[:k] + dims + f.labels.shape[k + 1 :])
    axes = [*(place[a] for a in f.axes[:k]), *range(axis, axis + len(dims)), *(place[a] for a in f.axes[k + 1 :])]
    return op.simplified(shape, labels, axes, f.scale_var, f.repeats)


@operator("GatherElements", "ScatterElements", "Scatter", positionwise=True, mergeable=True, free=True)
def gather_elements(op: OpContext) -> None:
    """Positions come from outside, for every entry on its own: all that reaches it is pinned."""
    for k in range(len(op.node.inputs)):
        op.pin(op.optional(k), f"{op.node.op_type} with indices from outside")
        op.freeze(op.optional(k))
    op.set(0)


@operator("GatherND", "ScatterND", positionwise=True, mergeable=True, free=True)
def gather_nd(op: OpContext) -> None:
    """Leading axes are indexed from outside; the trailing ones that are taken whole pass."""
    state, indices = op.state(0), op.state(1)
    depth = indices.shape[-1] + int(op.attr("batch_dims", 0))
    op.pin(indices, "indices")
    rest = op.pin_axes(state, range(depth), f"{op.node.op_type} with indices from outside").factors
    if op.node.op_type == "GatherND":
        shift = len(op.shape()) - state.rank
        op.set(
            0, [f.moved({a: a + shift for a in f.axes}) for f in rest], [a + shift for a in state.uniform if a >= depth]
        )
        return
    updates = op.state(2)
    shift = updates.rank - state.rank
    if op.attr("reduction", "none") not in ("none", "add"):
        op.freeze(updates)
        op.freeze(state)
    updates = op.pin_axes(updates, range(depth + shift), "ScatterND with indices from outside")
    lifted = State(state.shape, tuple(f.moved({a: a - shift for a in f.axes}) for f in updates.factors))
    out = []
    for f in rest:
        own = lifted.factor_of(f.axes[0])
        if own is not None and own.axes == f.axes:
            op.unify(f, own)
            op.rec.same(f.labels, f.scale_var, own.scale_var)
            out.append(f)
        else:
            op.rec.pin(f.labels, "ScatterND of updates that are fixed along this axis")
            op.freeze_factor(f)
    for f in lifted.factors:
        if not any(f.axes == g.axes for g in rest):
            op.rec.pin(f.labels, "ScatterND into data that is fixed along this axis")
            op.freeze_factor(f)
    op.set(0, out)


@operator(
    "Compress", "OneHot", "Unique", "NonMaxSuppression", "ReverseSequence", "Trilu",
    positionwise=True, mergeable=True, free=True,
)  # fmt: skip
def order_dependent(op: OpContext) -> None:
    """Positions matter."""
    raise UnsupportedPattern(f"{op.node.op_type} depends on positions")
