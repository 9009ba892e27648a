"""Reductions: a sum does not care about order, so the atoms of a reduced axis stay free and the factor ends."""

from __future__ import annotations

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.labels import ZERO, Factor
from cipm_ir.ops.context import OpContext, fixed
from cipm_ir.ops.registry import operator

_LINEAR = {"ReduceSum", "ReduceMean"}
_NORM = {"ReduceL1": 1, "ReduceL2": 1, "ReduceSumSquare": 2}
_ORDERED = {"ReduceMax", "ReduceMin"}
_REMOVABLE = {"ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"}


def reduced_axes(op: OpContext, rank: int) -> list[int]:
    """Return axes from the attribute (old opsets) or the second input.

    All when absent, none with noop_with_empty_axes.
    """
    axes = op.attr("axes")
    if axes is None and op.has(1):
        const = op.const(1)
        if const is None:
            raise UnsupportedPattern("axes of a reduction that are computed")
        axes = const.ravel().tolist()
    if not axes:
        return [] if op.attr("noop_with_empty_axes", 0) else list(range(rank))
    return [int(a) % rank for a in axes]


@operator("ReduceMean", reduces=True, linear=True, shifts=True)
@operator("ReduceSum", reduces=True, linear=True)
@operator("ReduceMax", "ReduceMin", reduces=True, shifts=True)
@operator("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceProd", "ReduceLogSum", "ReduceLogSumExp", reduces=True)
def reduce(op: OpContext) -> None:
    """Along unreduced axes like an activation of its degree; along reduced ones no scaling."""
    x, name = op.state(0), op.node.op_type
    gone = reduced_axes(op, x.rank)
    if not gone and name in _NORM:
        raise UnsupportedPattern("a norm over no axes")  # the identity, or a norm of each entry
    keep = bool(op.attr("keepdims", 1))
    place = {a: (a if keep else a - sum(g < a for g in gone)) for a in range(x.rank)}
    factors = []
    for f in x.factors:
        rest = tuple(a for a in f.axes if a not in gone)
        if len(rest) < len(f.axes):
            op.freeze_factor(f)
            if name not in _REMOVABLE:
                op.rec.normalizes(f.labels)
            if rest:
                factors.append(Factor(rest, op.rec.marginal(f, rest).labels, ZERO).moved(place))
            continue
        if name in _NORM:
            g = op.scaled(f, _NORM[name], sign=False)
        elif name in _LINEAR:
            g = f
        elif name in _ORDERED:
            op.freeze_factor(f, scale=False)
            g = f
        else:
            op.freeze_factor(f)
            g = fixed(f)
        factors.append(g.moved(place))
    op.set(0, factors, [place[a] for a in x.uniform if a not in gone])


@operator("ArgMax", "ArgMin", positionwise=True, free=True)
def arg_extremum(op: OpContext) -> None:
    """An index into the axis: its order is visible."""
    x = op.state(0)
    op.freeze(x)
    axis = int(op.attr("axis", 0)) % x.rank
    x = op.pin_axes(x, [axis], f"{op.node.op_type} gives positions along this axis")
    keep = bool(op.attr("keepdims", 1))
    place = {a: a if keep or a < axis else a - 1 for a in range(x.rank)}
    op.set(0, [fixed(f).moved(place) for f in x.factors], [place[a] for a in x.uniform])


@operator("TopK", positionwise=True, free=True)
def top_k(op: OpContext) -> None:
    """Values and positions in sorted order."""
    x = op.state(0)
    op.freeze(x)
    axis = int(op.attr("axis", -1)) % x.rank
    x = op.pin_axes(x, [axis], "TopK sorts along this axis")
    op.pin(op.optional(1), "k of TopK")
    rest = [fixed(f) for f in x.factors]
    for k in range(len(op.node.outputs)):
        op.set(k, rest, x.uniform)


@operator("CumSum", positionwise=True, free=True)
def cumulative_sum(op: OpContext) -> None:
    """Order matters along the axis, the others pass with their scale."""
    x = op.state(0)
    axis = op.const(1)
    axes = list(range(x.rank)) if axis is None else [int(axis.reshape(())) % x.rank]
    op.pin(op.optional(1), "axis of CumSum")
    rest = op.pin_axes(x, axes, "CumSum depends on order")
    op.like(0, rest, rest.uniform)
