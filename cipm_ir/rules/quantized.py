"""Quantization: labels pass, scales and zero points move with the axis that they describe, nothing is rescaled."""

from __future__ import annotations

import math

from cipm_ir.ir.labels import State
from cipm_ir.rules.context import OpContext, fixed
from cipm_ir.rules.contraction import contract, matmul_letters
from cipm_ir.rules.convolution import convolve
from cipm_ir.rules.registry import Opaque, operator
from cipm_ir.rules.resize import Resize


def _scalar(op: OpContext, *indices: int) -> None:
    """Inputs that must hold one number (a scale or zero point of a whole tensor)."""
    for index in indices:
        state = op.optional(index)
        if state is not None and math.prod(state.shape) > 1:
            raise Opaque(f"input {index} of {op.node.op_type} is not per tensor")


def _per_axis(op: OpContext, x: State, axis: int, *indices: int) -> None:
    """Tie vectors to an axis; a vector of one entry serves the whole tensor."""
    f = x.factor_of(axis)
    for index in indices:
        state = op.optional(index)
        if state is None or math.prod(state.shape) <= 1:
            continue
        if state.rank != 1:
            raise Opaque("quantization by blocks")
        op.freeze(state)
        if f is None:
            op.pin(state, f"{op.node.op_type} of a fixed axis")
        else:
            op.vector(index, op.rec.marginal(f, (axis,)))


@operator("QuantizeLinear", "DequantizeLinear")
def quantize(op: OpContext) -> None:
    """round(x / scale) + zero, or back; per tensor or per index of an axis. Opsets 10, 13, 19, 21 (blocks: opaque)."""
    x = op.state(0)
    scale = op.state(1)
    if op.attr("block_size", 0) or scale.rank > 1:
        raise Opaque("quantization by blocks")
    op.freeze(x)
    if math.prod(scale.shape) > 1:
        _per_axis(op, x, int(op.attr("axis", 1)) % x.rank, 1, 2)
        uniform = frozenset[int]()
    else:
        _scalar(op, 2)
        uniform = x.uniform
    op.like(0, State(x.shape, tuple(fixed(f) for f in x.factors), uniform))


@operator("DynamicQuantizeLinear")
def dynamic_quantize(op: OpContext) -> None:
    """Scale and zero point come from the extrema of the whole tensor: any order, but no scaling and no removal."""
    x = op.state(0)
    op.freeze(x)
    for f in x.factors:
        op.rec.normalizes(f.labels)
    op.like(0, State(x.shape, tuple(fixed(f) for f in x.factors), x.uniform))
    op.set(1)
    op.set(2)


def _conv_macs(op: OpContext) -> int:
    return math.prod(op.shape()) * math.prod(op.state(3).shape[1:])


def _resize_group(r: Resize) -> None:
    """A group keeps its width or goes as a whole."""
    if r.attr("group", 1) != 1 and r.old(0)[1] != r.new(0)[1]:
        r.set_attr("group", r.new(0)[1] // r.new(3)[1])


@operator("QLinearConv", macs=_conv_macs, resize=_resize_group)
def qlinear_conv(op: OpContext) -> None:
    """A convolution; scale and zero point of the weight may be per output channel."""
    x, w = op.state(0), op.state(3)
    for state in (x, w, op.optional(8)):
        op.freeze(state)
    _scalar(op, 1, 2, 6, 7)
    convolve(op, x, w, 3, 8)
    out = op.outputs[0]
    if out is not None:
        op.like(0, State(out.shape, tuple(fixed(f) for f in out.factors)))
        _per_axis(op, out, 1, 4, 5)


def _matmul_macs(op: OpContext) -> int:
    return math.prod(op.shape()) * op.state(0).shape[-1]


@operator("QLinearMatMul", macs=_matmul_macs)
def qlinear_matmul(op: OpContext) -> None:
    """A matrix product; scale and zero point of the second operand may be per column."""
    a, b = op.state(0), op.state(3)
    op.freeze(a)
    op.freeze(b)
    _scalar(op, 1, 2, 6, 7)
    left, right, names = matmul_letters(a, b, len(op.shape()))
    out = contract(op, [a, b], [left, right], names)
    if b.rank == 1:
        _scalar(op, 4, 5)
    else:
        _per_axis(op, out, out.rank - 1, 4, 5)
    op.like(0, State(out.shape, tuple(fixed(f) for f in out.factors)))
