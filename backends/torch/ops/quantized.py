"""Quantization: the arithmetic written out on ordinary tensors, gradients through the scales only."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from cipm_ir.backends.torch.emitter import Emitter, emits, refuse
from cipm_ir.backends.torch.ops.convolution import convolve, kernel_of, window
from cipm_ir.backends.torch.ops.elementwise import arg, first
from cipm_ir.backends.torch.tensors import torch_dtype
from cipm_ir.ir.constants import attribute

__all__: list[str] = []


def _range(node: ir.Node, kind: ir.DataType) -> tuple[int, int]:
    if not kind.is_integer() or kind.bitwidth < 8:
        raise refuse(node, f"quantization to {kind.name} is not written; use an integer type of 8 bits or more")
    info = np.iinfo(kind.numpy())
    return int(info.min), int(info.max)


def _along(e: Emitter, v: ir.Value | None, axis: int, rank: int) -> fx.Node | None:
    """A scale or zero point, one per tensor or one per position of an axis, ready to broadcast."""
    if v is None:
        return None
    shape = e.shape(v)
    if shape is None or len(shape) != 1 or shape[0] == 1:
        return e.value(v) if shape != (1,) else e.call(torch.select, e.value(v), 0, 0)
    return e.call(torch.reshape, e.value(v), [-1 if a == axis % rank else 1 for a in range(rank)])


def _axis(e: Emitter, node: ir.Node) -> tuple[int, int]:
    rank = e.rank(node, node.inputs[0])
    if attribute(node, "block_size", 0):
        raise refuse(node, "blocks along an axis are not written; use one scale per tensor or per axis")
    return attribute(node, "axis", 1), max(rank, 1)


def _quantized(e: Emitter, node: ir.Node, x: fx.Node, zero: fx.Node | None, kind: ir.DataType) -> fx.Node:
    """Round half to even, shift, saturate. `x` is divided by the scale already."""
    low, high = _range(node, kind)
    x = e.call(torch.round, x)
    if zero is not None:
        x = e.call(operator.add, x, zero)
    return e.method("to", e.call(torch.clamp, x, min=low, max=high), torch_dtype(kind))


@emits("QuantizeLinear")
def _quantize(e: Emitter, node: ir.Node) -> fx.Node:
    axis, rank = _axis(e, node)
    zero = arg(node, 2)
    chosen = attribute(node, "output_dtype", 0)
    kind = ir.DataType(chosen) if chosen else ir.DataType.UINT8 if zero is None else e.dtype(node, zero)
    scaled = e.call(operator.truediv, first(e, node), _along(e, node.inputs[1], axis, rank))
    return _quantized(e, node, scaled, _along(e, zero, axis, rank), kind)


@emits("DequantizeLinear")
def _dequantize(e: Emitter, node: ir.Node) -> fx.Node:
    axis, rank = _axis(e, node)
    if not e.dtype(node, node.inputs[0]).is_integer():
        raise refuse(node, "8-bit floats are not written; use integers")
    zero = _along(e, arg(node, 2), axis, rank)
    x = e.method("to", first(e, node), torch.int32)
    if zero is not None:
        x = e.call(operator.sub, x, e.method("to", zero, torch.int32))
    x = e.method("to", x, torch_dtype(e.dtype(node, node.inputs[1])))
    return e.call(operator.mul, x, _along(e, node.inputs[1], axis, rank))


@emits("DynamicQuantizeLinear")
def _dynamic_quantize(e: Emitter, node: ir.Node) -> list[fx.Node]:
    """To uint8, over the range of the data with 0 in it."""
    x = first(e, node)
    low = e.call(torch.clamp, e.call(torch.amin, x), max=0)
    high = e.call(torch.clamp, e.call(torch.amax, x), min=0)
    scale = e.call(operator.truediv, e.call(operator.sub, high, low), 255.0)
    offset = e.call(operator.truediv, e.call(torch.neg, low), scale)
    zero = e.call(torch.clamp, e.call(torch.round, offset), min=0, max=255)
    y = _quantized(e, node, e.call(operator.truediv, x, scale), zero, ir.DataType.UINT8)
    return [y, scale, e.method("to", zero, torch.uint8)]


def _centred(e: Emitter, node: ir.Node, which: int, zero: int, shape: list[int] | None = None) -> fx.Node:
    """An integer input minus its zero point in float64, in which products and sums of 8-bit integers are exact."""
    v, point = node.inputs[which], arg(node, zero)
    assert v is not None
    x = e.method("to", e.value(v), torch.float64)
    if point is None:
        return x
    z = e.value(point)
    if shape is not None and e.shape(point) not in ((), (1,)):
        z = e.call(torch.reshape, z, shape)
    return e.call(operator.sub, x, z)


@emits("MatMulInteger")
def _matmul_integer(e: Emitter, node: ir.Node) -> fx.Node:
    a = _centred(e, node, 0, 2, [-1, 1])
    return e.method("to", e.call(torch.matmul, a, _centred(e, node, 1, 3)), torch.int32)


@emits("ConvInteger")
def _conv_integer(e: Emitter, node: ir.Node) -> fx.Node:
    kernel = kernel_of(e, node)
    parts = (_centred(e, node, 1, 3, [-1] + [1] * (len(kernel) + 1)), None)
    out = convolve(e, _centred(e, node, 0, 2), parts, node, window(e, node, kernel))
    return e.method("to", out, torch.int32)


def _rescaled(e: Emitter, node: ir.Node, total: fx.Node, scales: list[Any], zero: ir.Value | None) -> fx.Node:
    """From an exact sum to the output type: times a · b / y in float32, as the kernels do it."""
    a, b, y = scales
    factor = e.call(operator.truediv, e.call(operator.mul, a, b), y)
    scaled = e.call(operator.mul, e.method("to", total, torch.float32), factor)
    return _quantized(e, node, scaled, e.optional(zero), e.dtype(node, zero))


@emits("QLinearMatMul")
def _qlinear_matmul(e: Emitter, node: ir.Node) -> fx.Node:
    total = e.call(torch.matmul, _centred(e, node, 0, 2, [-1, 1]), _centred(e, node, 3, 5))
    rows = _along(e, node.inputs[1], 0, 2)
    return _rescaled(e, node, total, [rows, e.optional(node.inputs[4]), e.optional(node.inputs[6])], node.inputs[7])


@emits("QLinearConv")
def _qlinear_conv(e: Emitter, node: ir.Node) -> fx.Node:
    shape = e.shape(node.inputs[3])
    if shape is None or not 3 <= len(shape) <= 5 or None in shape:
        raise refuse(node, "torch has convolutions over one to three axes with a kernel of known size")
    n = len(shape)
    kernel = [k for k in shape[2:] if k is not None]
    bias = e.optional(arg(node, 8))
    weight = _centred(e, node, 3, 5, [-1] + [1] * (n - 1))
    parts = (weight, None if bias is None else e.method("to", bias, torch.float64))
    total = convolve(e, _centred(e, node, 0, 2), parts, node, window(e, node, kernel))
    channels = _along(e, node.inputs[4], 1, n)
    return _rescaled(e, node, total, [e.optional(node.inputs[1]), channels, e.optional(node.inputs[6])], node.inputs[7])
