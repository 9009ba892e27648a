"""Normalizations and softmax: parameters move with the axis they scale; gamma and beta absorb the output's scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.labels import ZERO, Factor, State
from cipm_ir.ops.context import OpContext, fixed
from cipm_ir.ops.elementwise import broadcast, shifted, var_on
from cipm_ir.ops.registry import operator
from cipm_ir.ops.resize import Resize
from cipm_ir.ops.steps import plain


@operator("BatchNormalization", positionwise=True, mergeable=True, free=True)
def batch_normalization(op: OpContext) -> None:
    """Inference: input and output decouple. mean' = s mean, var' = s^2 (var + eps) - eps.

    A scaling of the input is exact in real arithmetic but rounds in the variance.
    """
    statistics = [v for v in op.node.outputs[1:] if v.name]  # asked for in training only (opsets 7 to 13, and 14)
    if op.attr("training_mode", 0) or (statistics and op.version >= 7):
        raise UnsupportedPattern("BatchNormalization in training mode")
    if not op.attr("spatial", 1):
        raise UnsupportedPattern("BatchNormalization per position (opset 8 and before)")
    x = op.state(0)
    f = x.factor_of(1) or _channels_of_parameters(op, x)
    if f is None or f.axes != (1,):
        for k in range(1, 5):
            op.pin(op.state(k), "BatchNormalization of fixed channels")
        op.pin(x, "BatchNormalization of channels that are fixed or joint")
        op.set(0, (), _alike(op, x, range(1, 5)), x.shape)
        return
    rec = op.rec
    gamma, beta, mean, variance = (op.vector(k, f) for k in range(1, 5))
    rec.inexact(f.labels, f.scale_var)
    y = rec.variable()
    if gamma is None or beta is None or mean is None or variance is None:
        op.freeze_factor(f)
        rec.zero(f.labels, y)
        for own in (gamma, beta, mean, variance):
            if own is not None:
                op.freeze_factor(own)
    else:
        rec.equate(f.labels, ((mean.scale_var, 1), (f.scale_var, -1)))
        rec.equate(f.labels, ((variance.scale_var, 1), (f.scale_var, -1)))  # s, of which the variance takes the square
        rec.same(f.labels, y, beta.scale_var)
        rec.equate(f.labels, ((gamma.scale_var, 1), (y, -1)), sign=False)
        rec.equate(f.labels, ((gamma.scale_var, 1), (y, 1), (f.scale_var, 1)), scale=False)
        # A file holds it in single precision, a program of torch in double: as it is, it is what runs.
        op.variance(4, float(op.attr("epsilon", float(np.float32(1e-5)))))
    others = [fixed(g) for g in x.factors if g is not f]
    for g in others:
        op.pin(State(x.shape, (g,)), "spatial position under BatchNormalization")
    op.set(0, (Factor((1,), f.labels, y, f.repeats),), x.uniform - {1}, x.shape)


def _channels_of_parameters(op: OpContext, x: State) -> Factor | None:
    """Channels that differ by their parameters alone: those of a value that is the same in all of them."""
    gamma = op.optional(1)
    own = None if gamma is None or 1 not in x.uniform else gamma.factor_of(0)
    if own is None or own.axes != (0,):
        return None
    f = Factor((1,), own.labels, ZERO, own.repeats)
    op.note_uniform_operand(0, 1, f, 1)
    return f


def _alike(op: OpContext, x: State, params: Iterable[int]) -> frozenset[int]:
    """Uniform axes of a value that is normalized with parameters per channel: theirs must be uniform, too."""
    states = [s for s in map(op.optional, params) if s is not None]
    return x.uniform if all(s.broadcasts(0) for s in states) else x.uniform - {1}


def _affine(op: OpContext, x: State, out: State, params: Sequence[State], *, signs: bool) -> State:
    """Output factors of a normalization with parameters gamma, beta aligned to ``out``."""
    factors = []
    for f in out.factors:
        own = [var_on(p, out.shape, f.axes) for p in params]
        gamma = own[0] if own else None
        if gamma is None or ZERO in own:
            for p in params:
                for g in shifted(p, out.rank).factors:
                    if set(g.axes) & set(f.axes):
                        op.freeze_factor(g)
            if signs:
                op.freeze_factor(Factor(f.axes, f.labels, var_on(x, out.shape, f.axes)), scale=False)
            factors.append(fixed(f))
            continue
        y = op.rec.variable()
        op.rec.equate(f.labels, ((gamma, 1), (y, -1)), sign=False)
        op.rec.equate(f.labels, ((gamma, 1), (y, 1), (var_on(x, out.shape, f.axes) if signs else ZERO, 1)), scale=False)
        if len(own) > 1:
            op.rec.same(f.labels, y, own[1])
        factors.append(Factor(f.axes, f.labels, y, f.repeats))
    return State(out.shape, tuple(factors), out.uniform)


def _normalized(op: OpContext, x: State, axes: range, *, signs: bool) -> None:
    op.freeze(x, sign=not signs)
    op.normalizes(x, axes)
    for f in x.factors:
        if signs and not any(a in axes for a in f.axes):
            op.freeze_factor(f)


def normalized(
    op: OpContext, x: State, params: Sequence[int], axis: int, *, signs: bool, source: int | None = None
) -> State:
    """Return the state of a value that is normalized over its axes from ``axis`` on.

    Args:
        op: the node.
        x: the value.
        params: inputs of the node that hold gamma and beta, as far as there are any.
        axis: the first axis of the statistics.
        signs: whether signs pass, because no mean is subtracted.
        source: the input of the node that the value is; None where it was computed inside the node.
    """
    x = x if source is not None else plain(x)
    out = broadcast(op, [x, *map(op.state, params)], op.node.op_type, [source, *params])
    _normalized(op, x, range(axis, x.rank), signs=signs)
    return _affine(op, x, out, [op.state(k) for k in params], signs=signs)


@operator("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", positionwise=True, free=True)
def layer_normalization(op: OpContext) -> None:
    """No scaling of the input (epsilon; one common scale at most); RMS admits any signs, the mean of LayerNorm none."""
    signs = op.node.op_type != "LayerNormalization"
    x = op.state(0)
    axis = int(op.attr("axis", -1)) % x.rank
    params = [k for k in ((1,) if signs else (1, 2)) if op.has(k)]
    made = normalized(op, x, params, axis, signs=signs, source=0)
    op.like(0, made, made.uniform)
    for k in range(1, len(op.node.outputs)):
        if op.node.outputs[k].name:
            op.set(k, [], ())
            for f in x.factors:
                if not all(a >= axis for a in f.axes):
                    raise UnsupportedPattern("statistics of a normalization over labelled axes")


@operator("InstanceNormalization", positionwise=True, free=True)
def instance_normalization(op: OpContext) -> None:
    """Per channel over space: signs pass through gamma; the epsilon forbids scaling the input."""
    x = op.state(0)
    f = x.factor_of(1)
    if f is None or f.axes != (1,) or len(x.factors) > 1:
        _instances_of_grids(op, x, f)
        return
    gamma, beta = op.vector(1, f), op.vector(2, f)
    op.freeze_factor(f, sign=False)
    y = op.rec.variable()
    if gamma is None or beta is None:
        op.freeze_factor(f)
        op.rec.zero(f.labels, y)
        for own in (gamma, beta):
            if own is not None:
                op.freeze_factor(own)
    else:
        op.rec.same(f.labels, y, beta.scale_var)
        op.rec.equate(f.labels, ((gamma.scale_var, 1), (y, -1)), sign=False)
        op.rec.equate(f.labels, ((gamma.scale_var, 1), (y, 1), (f.scale_var, 1)), scale=False)
    op.set(0, (Factor((1,), f.labels, y, f.repeats),), x.uniform - {1}, x.shape)


def _instances_of_grids(op: OpContext, x: State, f: Factor | None) -> None:
    """Rows of a joint factor are the instances, as in a group normalization written by reshapes."""
    op.freeze(x)
    op.normalizes(x, range(2, x.rank))
    rows = None if f is None else op.rec.marginal(f, (1,))
    for k in (1, 2):
        own = None if rows is None else op.vector(k, rows)
        if own is not None:
            op.freeze_factor(own)
        elif rows is None:
            op.pin(op.optional(k), "InstanceNormalization of fixed channels")
    op.set(0, (fixed(g) for g in x.factors), _alike(op, x, (1, 2)), x.shape)


def resize_groups(r: Resize) -> None:
    """A group keeps its width or goes as a whole; widths may shrink, alike in all groups."""
    rows = r.rows(0, 1, r.attr("num_groups", 1))
    if rows != r.attr("num_groups", 1):
        r.set_attr("num_groups", rows)


@operator("GroupNormalization", resize=resize_groups, positionwise=True, free=True)
def group_normalization(op: OpContext) -> None:
    """Groups are blocks. Scale and bias are per group before opset 21, per channel since."""
    x = op.state(0)
    groups = int(op.attr("num_groups", 1))
    f = x.factor_of(1)
    if f is None or f.axes != (1,) or len(x.factors) > 1:
        for k in range(3):
            op.pin(op.state(k), "GroupNormalization over fixed or joint channels")
        op.set(0, (), _alike(op, x, (1, 2)), x.shape)
        return
    op.freeze_factor(f)
    op.rec.normalizes(f.labels)
    grid = Factor((0, 1), f.labels.reshape(groups, -1), ZERO, f.repeats)
    if groups > 1:
        blocks = op.rec.marginal(grid, (0,)) if grid.labels.shape[1] > 1 else Factor((0,), f.labels, ZERO)
    if op.version >= 21:
        gamma, beta = op.vector(1, f), op.vector(2, f)
        if gamma is not None and beta is not None:
            op.rec.same(f.labels, gamma.scale_var, beta.scale_var)
            op.set(0, (Factor((1,), f.labels, gamma.scale_var, f.repeats),), x.uniform, x.shape)
            return
        for own in (gamma, beta):
            if own is not None:
                op.freeze_factor(own)
    elif groups > 1:
        for k in (1, 2):
            own = op.vector(k, Factor((0,), blocks.labels.ravel(), ZERO))
            if own is not None:
                op.freeze_factor(own)
    else:
        op.pin(op.state(1), "one group")
        op.pin(op.state(2), "one group")
    op.set(0, (fixed(f),), x.uniform, x.shape)


def _axes_of(op: OpContext, rank: int) -> list[int]:
    """Return axes that are normalized together."""
    if op.node.op_type == "MeanVarianceNormalization":
        return [int(a) % rank for a in op.attr("axes", (0, 2, 3))]
    if op.node.op_type == "LpNormalization" or op.version >= 13:
        return [int(op.attr("axis", -1)) % rank]
    return list(range(int(op.attr("axis", 1)) % rank, rank))


@operator("Softmax", "LogSoftmax", "LpNormalization", "MeanVarianceNormalization", positionwise=True, free=True)
def softmax(op: OpContext) -> None:
    """Does not care about order; admits no scaling. Before opset 13 it runs over all axes from ``axis`` on."""
    x = op.state(0)
    op.freeze(x)
    op.normalizes(x, _axes_of(op, x.rank))
    op.set(0, (fixed(f) for f in x.factors), x.uniform, x.shape)


@operator("Hardmax", positionwise=True, free=True)
def hardmax(op: OpContext) -> None:
    """Takes the first of equal entries, so order matters."""
    x = op.state(0)
    op.freeze(x)
    rest = op.pin_axes(x, _axes_of(op, x.rank), "Hardmax depends on order")
    op.set(0, (fixed(f) for f in rest.factors), rest.uniform, x.shape)
