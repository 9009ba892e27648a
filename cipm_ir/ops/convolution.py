"""Convolutions and pooling. Spatial positions and kernel taps are fixed; channels are contracted.

A grouped convolution ties its group index to a block on both sides. The in-axis of its weight means other channels in
every group, so its labels are a joint factor over (group, channel in the group).
"""

from __future__ import annotations

import math

import onnx_ir as ir

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.constants import attribute
from cipm_ir.ir.labels import ZERO, Factor, State
from cipm_ir.ops.context import OpContext
from cipm_ir.ops.contraction import add_bias, contract
from cipm_ir.ops.registry import operator
from cipm_ir.ops.resize import Resize


def resize_group(r: Resize) -> None:
    """Groups follow the channels: a group keeps its width or goes as a whole."""
    group = r.attr("group", 1)
    if group == 1:
        return
    for index, axis in ((0, 1), (1, 0)):
        r.rows(index, axis, group)  # an error where groups would keep unequal numbers
    old, new = r.old(0)[1], r.new(0)[1]
    width = r.new(1)[1] if r.node.op_type != "ConvTranspose" else None
    if width is None:  # ConvTranspose: weight is (in, out / group)
        out = r.new_out(0)[1]
        r.set_attr("group", out // r.new(1)[1])
    elif old != new:
        r.set_attr("group", new // width)


def _channels(op: OpContext, state: State, kind: str) -> State:
    """Return the first two axes; what moves along the others is pinned."""
    state = op.pin_axes(state, range(2, state.rank), f"{kind} of {op.node.op_type}")
    return State(state.shape[:2], state.factors, frozenset(a for a in state.uniform if a < 2))


def _with_bias(op: OpContext, out: State, index: int) -> None:
    bias = op.optional(index)
    out = State(op.shape(), out.factors, out.uniform & {0, 1})
    if bias is not None:
        d = out.rank - 2
        lifted = State(bias.shape + (1,) * d, bias.factors, bias.uniform)
        out = add_bias(op, out, lifted, index)
    op.like(0, out, out.uniform)


def pads_with_zeros(node: ir.Node) -> bool:
    """Return whether zeros beside the input of a convolution count."""
    return any(attribute(node, "pads", ())) or attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")


@operator("Conv", "ConvInteger", resize=resize_group, mergeable=True, pads=pads_with_zeros)
def conv(op: OpContext) -> None:
    """Channels contract, whatever the kernel, strides, dilations and zero padding."""
    if op.node.op_type == "ConvInteger":
        op.freeze(op.state(0))
        op.freeze(op.state(1))
        if any(s is not None and math.prod(s.shape) > 1 for s in (op.optional(2), op.optional(3))):
            raise UnsupportedPattern("per-channel zero points of ConvInteger")
    convolve(op, op.state(0), op.state(1), 1, None if op.node.op_type == "ConvInteger" else 2)


def convolve(op: OpContext, x: State, w: State, weight: int, bias: int | None) -> None:
    """Convolution of input ``x`` with weight ``w``, which is input number ``weight`` of the node."""
    group = int(op.attr("group", 1))
    x, w = _channels(op, x, "spatial position"), _channels(op, w, "kernel tap")
    if group == 1:
        out = contract(op, [x, w], [("n", "c"), ("o", "c")], ("n", "o"), (0, weight))
    else:
        batch = tuple(f for f in x.factors if f.axes == (0,))
        out = State(op.shape()[:2], (*batch, *_grouped(op, x, w, group, weight)), x.uniform & {0})
    if bias is not None:
        _with_bias(op, out, bias)
    else:
        op.set(0, out.factors, out.uniform & {0, 1})


def _simple(state: State, axis: int) -> Factor | None:
    f = state.factor_of(axis)
    if f is not None and f.axes != (axis,):
        raise UnsupportedPattern("a joint factor over channels of a grouped convolution")
    return f


def _grouped(op: OpContext, x: State, w: State, group: int, weight: int) -> tuple[Factor, ...]:
    """(group, in) of x meets the weight's joint in-axis; group blocks of x and out are tied."""
    rec = op.rec
    fx, fo = _simple(x, 1), _simple(w, 0)
    channels, outs = x.shape[1], w.shape[0]
    if fx is None or fo is None:
        op.pin_axes(x, [1], "grouped convolution with fixed channels")
        op.pin(w, "grouped convolution with fixed channels")
        return ()
    if channels == group and outs == group:  # depthwise
        op.unify(fx, fo)
        var = rec.variable()
        rec.equate(fx.labels, ((var, 1), (fx.scale_var, -1), (fo.scale_var, -1)))
        return (Factor((1,), fo.labels, var, fo.repeats),)
    x_grid = Factor((0, 1), fx.labels.reshape(group, -1), fx.scale_var, fx.repeats)
    o_grid = Factor((0, 1), fo.labels.reshape(group, -1), fo.scale_var, fo.repeats)
    x_block = x_grid if channels == group else rec.marginal(x_grid, (0,))
    o_block = o_grid if outs == group else rec.marginal(o_grid, (0,))
    rec.unify(x_block.labels.ravel(), o_block.labels.ravel())
    if channels == group:  # one input channel per group: the weight's in-axis has size 1
        op.freeze_factor(fx)
        return (Factor((1,), fo.labels, fo.scale_var, fo.repeats),)
    joint = op.grouped(weight, 1, group)
    if joint is not None:
        rec.unify(x_grid.labels, joint.labels)
        rec.contracted(x_grid.labels, joint.labels)
        rec.equate(joint.labels, ((fx.scale_var, 1), (joint.scale_var, 1)))
    else:
        fi = _simple(w, 1)
        columns = rec.marginal(x_grid, (1,))
        if fi is None:
            rec.pin(columns.labels, "grouped convolution with a fixed in-axis")
        else:
            rec.unify(columns.labels, fi.labels)
            rec.contracted(fx.labels, fi.labels)
            op.freeze_factor(fi)
        op.freeze_factor(fx)
    return (Factor((1,), fo.labels, fo.scale_var, fo.repeats),)


@operator("ConvTranspose", resize=resize_group, mergeable=True)
def conv_transpose(op: OpContext) -> None:
    """Weight (in, out / group, kernel)."""
    x, w = _channels(op, op.state(0), "spatial position"), _channels(op, op.state(1), "kernel tap")
    group = int(op.attr("group", 1))
    if group == 1:
        _with_bias(op, contract(op, [x, w], [("n", "c"), ("c", "o")], ("n", "o"), (0, 1)), 2)
        return
    rec = op.rec
    x = op.pin_axes(x, [0], "batch of a grouped transposed convolution")
    fx, fc = _simple(x, 1), _simple(w, 0)
    channels, outs = x.shape[1], op.shape()[1]
    if fx is None or fc is None:
        raise UnsupportedPattern("grouped transposed convolution with fixed channels")
    op.unify(fx, fc)
    if not channels == group == outs:
        rec.contracted(fx.labels, fc.labels)
    if channels == group == outs:
        var = rec.variable()
        rec.equate(fx.labels, ((var, 1), (fx.scale_var, -1), (fc.scale_var, -1)))
        _with_bias(op, State(op.shape()[:2], (Factor((1,), fx.labels, var, fx.repeats),)), 2)
        return
    rec.equate(fx.labels, ((fx.scale_var, 1), (fc.scale_var, 1)))
    joint = op.grouped(1, 1, group)
    grid = Factor((0, 1), fx.labels.reshape(group, -1), fx.scale_var, fx.repeats)
    block = grid if channels == group else rec.marginal(grid, (0,))
    if joint is None:
        if w.shape[1] > 1 or outs != group:
            raise UnsupportedPattern("grouped transposed convolution with a computed weight")
        rec.zero(fx.labels, fx.scale_var)
        _with_bias(op, State(op.shape()[:2], (Factor((1,), block.labels.ravel(), ZERO),)), 2)
        return
    rec.unify(block.labels.ravel(), rec.marginal(joint, (0,)).labels)
    _with_bias(op, State(op.shape()[:2], (Factor((1,), joint.labels.ravel(), joint.scale_var),)), 2)


def averages_zeros(node: ir.Node) -> bool:
    """Return whether zeros beside the input count in an average."""
    return bool(attribute(node, "count_include_pad", 0))


@operator("AveragePool", pools=True, linear=True, shifts=True, pads=averages_zeros)
@operator("GlobalAveragePool", pools=True, linear=True, shifts=True)
@operator("MaxPool", "GlobalMaxPool", pools=True, shifts=True)
@operator("LpPool", "GlobalLpPool", "MaxRoiPool", "RoiAlign", pools=True)
def pool(op: OpContext) -> None:
    """Channels pass; averages keep signs, maxima do not, norms end them."""
    x = _channels(op, op.state(0), "spatial position")
    name = op.node.op_type
    for k in range(1, len(op.node.inputs)):
        op.pin(op.optional(k), f"regions of {name}")
    if "Roi" in name:  # the first axis of the output counts regions
        x = op.pin_axes(x, [0], f"batch of {name}")
    factors = x.factors
    if "Lp" in name:
        factors = tuple(op.scaled(f, 1, sign=False) for f in factors)
    elif "Average" not in name:
        op.freeze(x, scale=False)
    op.set(0, factors, x.uniform)
    if len(op.node.outputs) > 1 and op.node.outputs[1].name:  # indices count positions across the channels
        raise UnsupportedPattern("MaxPool with indices")


@operator("LRN", positionwise=True, free=True)
def lrn(op: OpContext) -> None:
    """Local response normalization mixes neighbouring channels."""
    op.freeze(op.state(0))
    rest = op.pin_axes(op.state(0), [1], "LRN mixes neighbouring channels")
    op.like(0, rest, rest.uniform)
