"""Quantization: labels pass, scales and zero points move with the axis that they describe, no integer ever changes.

Where the real-valued side of an axis is scaled, the vector of quantization scales along it is scaled instead.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.labels import ZERO, Factor, State
from cipm_ir.ir.parameters import parameter_tensor
from cipm_ir.ops.context import OpContext, fixed
from cipm_ir.ops.contraction import contract, matmul_letters
from cipm_ir.ops.convolution import convolve
from cipm_ir.ops.registry import operator
from cipm_ir.ops.resize import Resize


def single_numbers(op: OpContext, *indices: int) -> None:
    """Inputs that must hold one number (a scale or zero point of a whole tensor)."""
    for index in indices:
        state = op.optional(index)
        if state is not None and math.prod(state.shape) > 1:
            raise UnsupportedPattern(f"input {index} of {op.node.op_type} is not per tensor")


def per_axis(op: OpContext, x: State, axis: int, *indices: int) -> None:
    """Tie vectors to an axis; a vector of one entry serves the whole tensor."""
    f = x.factor_of(axis)
    for index in indices:
        state = op.optional(index)
        if state is None or math.prod(state.shape) <= 1:
            continue
        if state.rank != 1:
            raise UnsupportedPattern("quantization by blocks")
        op.freeze(state)
        if f is None:
            op.pin(state, f"{op.node.op_type} of a fixed axis")
        else:
            op.vector(index, op.rec.marginal(f, (axis,)))


def _steps(op: OpContext, x: State, axis: int) -> Factor | None:
    """Tie scales and zero points to an axis; the factor of the scales, where they can take up a scaling of the axis.

    Their signs stay: no runtime expects a negative scale.
    """
    f, vector = x.factor_of(axis), op.state(1).factor_of(0)
    if f is None or f.axes != (axis,) or vector is None:
        per_axis(op, x, axis, 1, 2)
        return None
    per_axis(op, x, axis, 2)
    op.vector(1, f)
    op.freeze_factor(vector, scale=False)
    return vector


def _pair(integers: ir.Value | None) -> bool:
    """Return whether these integers lie in a fake quantization: all that reads them undoes what made them.

    Its two ends keep equal scales, as tools that look for the pair expect.
    """
    maker = None if integers is None else integers.producer()
    if integers is None or maker is None or maker.op_type != "QuantizeLinear" or integers.is_graph_output():
        return False
    return all(
        use.node.op_type == "DequantizeLinear" and use.idx == 0 and _equal(use.node.inputs[1], maker.inputs[1])
        for use in integers.uses()
    )


def _equal(a: ir.Value | None, b: ir.Value | None) -> bool:
    """Return whether two inputs are the same value, or parameters with equal entries."""
    if a is b or a is None or b is None:
        return a is b
    x, y = parameter_tensor(a), parameter_tensor(b)
    return x is not None and y is not None and np.array_equal(x.numpy(), y.numpy())


@operator("QuantizeLinear", "DequantizeLinear", positionwise=True, free=True)
def quantize(op: OpContext) -> None:
    """round(x / scale) + zero, or back; per tensor or per index of an axis. Opsets 10, 13, 19, 21 (blocks: opaque).

    Along the axis of the scales, l_real = l_scale; elsewhere l_real = 0. Powers of two leave every integer as it is;
    other scales are exact up to the rounding of x / scale.
    """
    x, scale = op.state(0), op.state(1)
    if op.attr("block_size", 0) or scale.rank > 1:
        raise UnsupportedPattern("quantization by blocks")
    steps: Factor | None = None
    along: Factor | None = None
    axis = int(op.attr("axis", 1)) % x.rank if math.prod(scale.shape) > 1 else -1
    if axis >= 0:
        steps, along = _steps(op, x, axis), x.factor_of(axis)
    else:
        single_numbers(op, 2)
    factors = tuple(_scaled(op, f, steps) if steps is not None and f is along else _kept(op, f) for f in x.factors)
    op.set(0, factors, x.uniform - {axis}, x.shape)


def _kept(op: OpContext, f: Factor) -> Factor:
    op.freeze_factor(f)
    return fixed(f)


def _scaled(op: OpContext, f: Factor, steps: Factor) -> Factor:
    """Return the factor behind the node, along the axis of the scales.

    Integers of a fake quantization carry its scales on.
    """
    quantizes = op.node.op_type == "QuantizeLinear"
    pair = _pair((op.node.outputs if quantizes else op.node.inputs)[0])
    if quantizes or pair:
        op.rec.same(f.labels, f.scale_var, steps.scale_var)
    op.freeze_factor(f, scale=not quantizes and not pair)
    return Factor(f.axes, f.labels, steps.scale_var if pair or not quantizes else ZERO, f.repeats)


@operator("DynamicQuantizeLinear", positionwise=True, free=True)
def dynamic_quantize(op: OpContext) -> None:
    """Scale and zero point come from the extrema of the whole tensor: any order, but no scaling and no removal."""
    x = op.state(0)
    op.freeze(x)
    for f in x.factors:
        op.rec.normalizes(f.labels)
    op.set(0, (fixed(f) for f in x.factors), x.uniform, x.shape)
    op.set(1)
    op.set(2)


def resize_quantized_group(r: Resize) -> None:
    """A group keeps its width or goes as a whole."""
    if r.attr("group", 1) != 1 and r.old(0)[1] != r.new(0)[1]:
        r.set_attr("group", r.new(0)[1] // r.new(3)[1])


@operator("QLinearConv", resize=resize_quantized_group)
def qlinear_conv(op: OpContext) -> None:
    """A convolution; scale and zero point of the weight may be per output channel."""
    x, w = op.state(0), op.state(3)
    for state in (x, w, op.optional(8)):
        op.freeze(state)
    single_numbers(op, 1, 2, 6, 7)
    convolve(op, x, w, 3, 8)
    out = op.outputs[0]
    if out is not None:
        op.set(0, (fixed(f) for f in out.factors), out.uniform - {1})
        per_axis(op, out, 1, 4, 5)


@operator("QLinearMatMul")
def qlinear_matmul(op: OpContext) -> None:
    """A matrix product; scale and zero point of the second operand may be per column."""
    a, b = op.state(0), op.state(3)
    op.freeze(a)
    op.freeze(b)
    single_numbers(op, 1, 2, 6, 7)
    left, right, names = matmul_letters(a, b, len(op.shape()))
    out = contract(op, [a, b], [left, right], names, (0, 3))
    if b.rank == 1:
        single_numbers(op, 4, 5)
    else:
        per_axis(op, out, out.rank - 1, 4, 5)
    op.set(0, (fixed(f) for f in out.factors), out.uniform - {out.rank - 1})
