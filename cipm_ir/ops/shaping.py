"""Reshape-like operators: the labels of a minimal group of axes are broadcast over it, reshaped, and simplified."""

from __future__ import annotations

import math

import numpy as np

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.labels import Factor, Labels, State, reshape_groups
from cipm_ir.ops.context import OpContext, fixed
from cipm_ir.ops.registry import operator
from cipm_ir.ops.resize import Resize, target_rule

_MOST = 1 << 22
"""Labels written out at most, where a dynamic size makes them many."""


def reshaped(op: OpContext, state: State, new: tuple[int, ...], index: int | None = None) -> State:
    """Return the state of a value after a row-major reshape to ``new``.

    Args:
        op: the node.
        state: of the value before.
        new: its shape afterwards.
        index: which input of the node the value is, with the axes that it came in with; None where it is none.
    """
    groups = reshape_groups(state.shape, new)
    if groups is None:
        raise UnsupportedPattern(f"shapes {state.shape} and {new} cannot be aligned")
    where: dict[int, int] = {}
    for g, (old_axes, _) in enumerate(groups):
        for a in old_axes:
            where[a] = g
    factors = []
    pending = list(state.factors)
    while pending:
        cluster = [pending.pop()]
        touched = {where[a] for a in cluster[0].axes}
        for f in list(pending):  # factors that share a group become one
            if touched & {where[a] for a in f.axes}:
                cluster.append(f)
                pending.remove(f)
                touched |= {where[a] for a in f.axes}
        factor = cluster[0] if len(cluster) == 1 else _product(op, state, cluster)
        moved = _reshape_factor(op, state, factor, [groups[g] for g in sorted(touched)], new, index)
        if moved is not None:
            factors.append(moved)
    if index is not None:
        labelled = {where[a] for f in state.factors for a in f.axes}
        fixed = (_fixed_copies(op, state, *pair, new, index) for g, pair in enumerate(groups) if g not in labelled)
        factors += [f for f in fixed if f is not None]
    uniform = [
        b for old_axes, new_axes in groups for b in new_axes
        if new[b] > 1 and all(state.broadcasts(a) for a in old_axes)
    ]  # fmt: skip
    factors.sort(key=lambda f: f.axes)
    return State(tuple(new), tuple(factors), frozenset(uniform))


def _product(op: OpContext, state: State, cluster: list[Factor]) -> Factor:
    """Return one joint factor for several over different axes that a reshape merges.

    A grid of cells tied to its sides.
    """
    if len(cluster) > 2:  # of a convolution's weight (in, taps, taps) the taps are fixed anyway
        longest = max(cluster, key=lambda f: (f.labels.size, -f.axes[0]))
        for f in cluster:
            if f is not longest:
                op.pin(State(state.shape, (f,)), "merged with two other labelled axes by a reshape")
        return longest
    axes = tuple(sorted(a for f in cluster for a in f.axes))
    cells = Factor(axes, op.rec.fresh(*(state.shape[a] for a in axes)))
    for f in cluster:
        op.freeze_factor(f)
        op.rec.unify(op.rec.marginal(cells, f.axes).labels, f.labels)
    return cells


def _reshape_factor(
    op: OpContext, state: State, f: Factor, groups: list[tuple[range, range]], new: tuple[int, ...], index: int | None
) -> Factor | None:
    if all(len(o) == 1 == len(n) for o, n in groups):  # axes only change places
        return f.moved({o[0]: n[0] for o, n in groups})
    old_axes = [a for o, _ in groups for a in o]
    new_axes = [b for _, n in groups for b in n]
    sizes = [state.shape[a] for a in old_axes]
    spread = [a for a in old_axes if a not in f.axes and state.shape[a] > 1 and a not in state.uniform]

    def made(shape: list[int], labels: Labels) -> Factor | None:
        """Return the factor with these labels over the old axes, repeated along those that ``shape`` leaves out."""
        whole = np.broadcast_to(labels.reshape(shape), sizes).reshape([new[b] for b in new_axes])
        return op.simplified(new, whole, new_axes, f.scale_var, f.repeats or bool(spread))

    plain = made([n if a in f.axes else 1 for a, n in zip(old_axes, sizes, strict=True)], f.labels)
    shape = [1 if a in spread else n for a, n in zip(old_axes, sizes, strict=True)]
    if index is None or plain is None or f.repeats or math.prod(shape) == f.labels.size:
        return plain
    counted = made(shape, np.arange(math.prod(shape)))
    if counted is None or counted.axes != plain.axes:
        return plain  # its uniform axes come out as axes of their own
    source = f.labels.reshape([n if a in f.axes else 1 for a, n in zip(old_axes, sizes, strict=True)])
    copies = op.rec.copied(np.broadcast_to(source, shape))
    for place in old_axes:
        op.note_uniform_operand(index, place, Factor(tuple(old_axes), copies), place)
    return made(shape, copies)


def _fixed_copies(
    op: OpContext, state: State, old: range, new_axes: range, new: tuple[int, ...], index: int
) -> Factor | None:
    """Return labels where an Expand of a fixed axis is merged with it.

    Key heads from a cache, copied for query heads.
    """
    value = op.node.inputs[index]
    maker = None if value is None else value.producer()
    wide = [a for a in old if state.shape[a] > 1]
    same, axes = [a for a in wide if a in state.uniform], [b for b in new_axes if new[b] > 1]
    if maker is None or maker.op_type != "Expand" or len(wide) != 2 or len(same) != 1 or len(axes) != 1:
        return None
    second = op.second_shape(value)
    if second is None or any(second[a] != state.shape[a] for a in wide):
        return None
    shape = [state.shape[a] for a in wide]
    sizes = [1 if a in same else n for a, n in zip(wide, shape, strict=True)]
    copies = op.rec.copied_fixed(sizes, shape, "copies of a fixed axis")
    op.note_uniform_operand(index, same[0], Factor(tuple(wide), copies), same[0])
    return Factor((axes[0],), copies.ravel())


@operator("Reshape", "Flatten", "Squeeze", "Unsqueeze", resize=lambda r: _resize(r), literals=(1,), moves=True)
def reshape(op: OpContext) -> None:
    """Any change of shape that keeps the row-major order."""
    state, new = op.state(0), op.shape()
    a = op.second_shape(op.node.inputs[0])
    b = op.second_shape(op.node.outputs[0])
    known = a is not None and b is not None and reshape_groups(state.shape, new) == reshape_groups(a, b)
    if op.node.op_type == "Reshape" and (target := op.varies(1)) is not None and b is not None:
        # A size that is the same at both assignments, but need not be: min(T, 64).
        known = known and not any(v and x == y for v, x, y in zip(target, new, b, strict=False))
    if state.factors and (a, b) != (state.shape, new) and not known:
        raise UnsupportedPattern("how axes are grouped depends on a dynamic size")
    for k in range(1, len(op.node.inputs)):
        op.pin(op.optional(k), "target shape")
    if state.factors and (a, b) != (state.shape, new) and math.prod(new) > _MOST and _mixes(state, new):
        raise UnsupportedPattern("units are mixed with a dynamic axis")
    made = reshaped(op, state, new, 0)
    op.like(0, made, made.uniform)


def _mixes(state: State, new: tuple[int, ...]) -> bool:
    """Return whether a labelled axis is split or merged with others.

    Labels are then written out for each of their entries.
    """
    groups = reshape_groups(state.shape, new) or []
    return any(
        math.prod(state.shape[a] for a in old) > _MOST and any(set(old) & set(f.axes) for f in state.factors)
        for old, _ in groups
    )


_retarget = target_rule(1)


def _resize(r: Resize) -> None:
    if r.node.op_type == "Reshape":
        _retarget(r)
    elif r.node.op_type == "Squeeze" and r.literal(1) is None and r.attr("axes") is None:
        axes = [a for a, n in enumerate(r.old(0)) if n == 1]  # an axis that shrinks to 1 stays
        if r.version < 13:
            r.set_attr("axes", axes)
        else:
            r.set_literal(1, np.asarray(axes, np.int64))


@operator("Expand", resize=target_rule(1), literals=(1,), moves=True)
def expand(op: OpContext) -> None:
    """New and expanded axes are uniform."""
    state, shape = op.state(0), op.shape()
    op.pin(op.optional(1), "target shape")
    d = len(shape) - state.rank
    factors = [f.moved({a: a + d for a in f.axes}) for f in state.factors]
    grown = {b for b in range(len(shape)) if shape[b] > 1 and (b < d or state.shape[b - d] == 1)}
    op.set(0, factors, grown | {a + d for a in state.uniform})


@operator("Transpose", moves=True)
def transpose(op: OpContext) -> None:
    """Axes change places."""
    state = op.state(0)
    perm = op.attr("perm") or tuple(range(state.rank))[::-1]
    place = {int(a): b for b, a in enumerate(perm)}
    factors = []
    for f in state.factors:
        g = f.moved(place)
        if f.repeats and len(f.axes) > 1:
            position = np.arange(f.labels.size).reshape(f.labels.shape)
            source = Factor(f.axes, position).moved(place).labels
            if not np.array_equal(source.ravel(), np.arange(f.labels.size)):
                op.rec.reindexed(f.labels, g.labels, source)
        factors.append(g)
    factors.sort(key=lambda f: f.axes)
    op.set(0, factors, [place[a] for a in state.uniform])


def _resize_blocks(r: Resize) -> None:
    """Whole channels go: the block size stays."""
    old, new = (r.old(0), r.old_out(0)), (r.new(0), r.new_out(0))
    few, many = new[::-1] if r.node.op_type == "DepthToSpace" else new
    if few[1] * r.attr("blocksize", 1) ** 2 != many[1] or any(a[2:] != b[2:] for a, b in zip(old, new, strict=True)):
        raise UnsupportedPattern("blocks of positions that lose some of them")


@operator("DepthToSpace", "SpaceToDepth", resize=_resize_blocks, moves=True)
def depth_space(op: OpContext) -> None:
    """A reshape, a transpose and a reshape (ONNX DepthToSpace, modes DCR and CRD)."""
    state, out, b = op.state(0), op.shape(), int(op.attr("blocksize"))
    n, c, h, w = state.shape
    mode = op.attr("mode", "DCR")
    if op.node.op_type == "SpaceToDepth":
        steps = ((n, c, h // b, b, w // b, b), (0, 3, 5, 1, 2, 4))
    elif mode in ("CRD", b"CRD"):
        steps = ((n, c // (b * b), b, b, h, w), (0, 1, 4, 2, 5, 3))
    else:
        steps = ((n, b, b, c // (b * b), h, w), (0, 3, 4, 1, 5, 2))
    middle = reshaped(op, state, steps[0])
    place = {a: k for k, a in enumerate(steps[1])}
    shape = tuple(steps[0][a] for a in steps[1])
    moved = State(shape, tuple(f.moved(place) for f in middle.factors), frozenset(place[a] for a in middle.uniform))
    made = reshaped(op, moved, out)
    op.like(0, made, made.uniform)


@operator("Shape", "Size", sizes_only=True)
def shape_only(op: OpContext) -> None:
    """Shapes do not move."""
    op.set(0)


@operator("NonZero", "EyeLike", "RandomNormalLike", "RandomUniformLike", "Bernoulli", free=True)
def by_position(op: OpContext) -> None:
    """What depends on positions pins."""
    raise UnsupportedPattern(f"{op.node.op_type} depends on positions")


@operator(
    "ConstantOfShape", "RandomNormal", "RandomUniform", literals=(0,), positionwise=True, mergeable=True, free=True
)
def constant_of_shape(op: OpContext) -> None:
    """One value everywhere: uniform along every axis. (Of a constant shape, it is a parameter and not seen here.)"""
    op.pin(op.optional(0), "shape")
    shape = op.shape()
    op.set(0, (), range(len(shape)) if op.node.op_type == "ConstantOfShape" else ())


@operator("Range", positionwise=True, mergeable=True, free=True)
def value_range(op: OpContext) -> None:
    """A fixed sequence."""
    for k in range(3):
        op.pin(op.optional(k), "bound of Range")
    op.set(0)


@operator(
    "Resize", "Upsample", resize=lambda r: _resize_sizes(r), literals=(1, 2, 3),
    positionwise=True, mergeable=True, free=True,
)  # fmt: skip
def resize(op: OpContext) -> None:
    """Interpolates over space; an axis whose size stays is passed. Linear along the others."""
    state, out = op.state(0), op.shape()
    if op.attr("coordinate_transformation_mode", "half_pixel") in ("tf_crop_and_resize", b"tf_crop_and_resize"):
        raise UnsupportedPattern("Resize with a crop")
    changed = _scaled_axes(op, state.rank) | {a for a in range(state.rank) if state.shape[a] != out[a]}
    if (sizes := op.varies(3)) is not None:
        axes = [int(a) % state.rank for a in op.attr("axes") or range(state.rank)]
        changed |= {a for a, varies in zip(axes, sizes, strict=False) if varies}
    state = op.pin_axes(state, sorted(changed), "interpolated axis")
    for k in range(1, len(op.node.inputs)):
        op.pin(op.optional(k), "scales or sizes of Resize")
    factors = list(state.factors)
    op.set(0, [fixed(f) if len(f.axes) > 1 else f for f in factors], state.uniform)
    for f in factors:
        if len(f.axes) > 1:
            op.freeze_factor(f)


def _scaled_axes(op: OpContext, rank: int) -> set[int]:
    """Return axes with a scale other than one: even where the size comes out the same, positions are interpolated."""
    index = 1 if op.node.op_type == "Upsample" or op.version < 11 else 2
    scales = op.attr("scales")
    if scales is None:
        const = op.const(index) if op.has(index) else np.ones(0)
        if const is None:
            return set(range(rank))
        scales = const.ravel().tolist()
    axes = op.attr("axes") or range(rank)
    return {int(a) % rank for a, s in zip(axes, scales, strict=False) if s != 1}


def _resize_sizes(r: Resize) -> None:
    sizes = r.literal(3)
    if sizes is None or not sizes.size or r.old_out(0) == r.new_out(0):
        return
    axes = r.attr("axes") or range(len(r.new_out(0)))
    r.set_literal(3, np.asarray([r.new_out(0)[a] for a in axes], np.int64))
