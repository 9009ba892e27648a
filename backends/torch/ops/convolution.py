"""Convolutions, and the padding that they share with the pools."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch.nn.functional as F
from torch import fx

from cipm_ir.backends.torch.emitter import Emitter, Int, emits, refuse
from cipm_ir.backends.torch.ops.elementwise import arg, first
from cipm_ir.backends.torch.ops.sizes import ceil_div, compute, maximum
from cipm_ir.ir.constants import attribute

__all__ = ["Window", "pad_ends", "window"]

_CONV: dict[int, Callable[..., Any]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Any]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class Window:
    """A sliding window, per spatial axis: sizes, steps, dilations, padding before and after."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[Int, ...]
    ends: tuple[Int, ...]

    @property
    def reach(self) -> tuple[int, ...]:
        """Positions from the first tap to the last, inclusive."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    @property
    def symmetric(self) -> bool:
        """Whether the padding is the same number on both sides."""
        return self.begins == self.ends and not any(isinstance(p, fx.Node) for p in self.begins)


def window(e: Emitter, node: ir.Node, kernel: Sequence[int]) -> Window:
    """The window of a convolution or a pool over its first input, automatic padding worked out."""
    n = len(kernel)
    strides, dilations = tuple(attribute(node, "strides", [1] * n)), tuple(attribute(node, "dilations", [1] * n))
    mode = attribute(node, "auto_pad", "NOTSET")
    pads = [0] * (2 * n) if mode == "VALID" else list(attribute(node, "pads", [0] * (2 * n)))
    plain = Window(tuple(kernel), strides, dilations, tuple(pads[:n]), tuple(pads[n:]))
    if mode in ("NOTSET", "VALID"):
        return plain
    x = node.inputs[0]
    assert x is not None
    less, more = zip(*(_same_padding(e, x, k, plain) for k in range(n)), strict=True)
    begins, ends = (less, more) if mode == "SAME_UPPER" else (more, less)
    return Window(tuple(kernel), strides, dilations, begins, ends)


def _same_padding(e: Emitter, x: ir.Value, k: int, w: Window) -> tuple[Int, Int]:
    """The smaller and the larger half of the padding that keeps ceil(size / stride) outputs."""
    reach, stride = w.reach[k], w.strides[k]
    if stride == 1:
        total: Int = reach - 1
    else:
        size = e.size(x, 2 + k)
        covered = compute(e, operator.mul, compute(e, operator.sub, ceil_div(e, size, stride), 1), stride)
        total = maximum(e, compute(e, operator.sub, compute(e, operator.add, covered, reach), size), 0)
    less = compute(e, operator.floordiv, total, 2)
    return less, compute(e, operator.sub, total, less)


def pad_ends(begins: Sequence[Int], ends: Sequence[Int]) -> list[Int]:
    """Padding in the order of F.pad: last axis first, before and after."""
    return [p for pair in zip(reversed(begins), reversed(ends), strict=True) for p in pair]


def kernel_of(e: Emitter, node: ir.Node) -> tuple[int, ...]:
    """Spatial sizes of the kernel of a convolution."""
    shape = e.shape(node.inputs[1])
    kernel = attribute(node, "kernel_shape", None if shape is None else shape[2:])
    if kernel is None or None in kernel or not 1 <= len(kernel) <= 3:
        raise refuse(node, "torch has convolutions over one to three axes with a kernel of known size")
    return tuple(kernel)


@emits("Conv")
def _conv(e: Emitter, node: ir.Node) -> fx.Node:
    kernel = kernel_of(e, node)
    return convolve(e, first(e, node), weight_and_bias(e, node), node, window(e, node, kernel))


def weight_and_bias(e: Emitter, node: ir.Node) -> tuple[fx.Node, fx.Node | None]:
    """Inputs 1 and 2."""
    weight = node.inputs[1]
    assert weight is not None
    return e.value(weight), e.optional(arg(node, 2))


def convolve(e: Emitter, x: fx.Node, parts: tuple[fx.Node, fx.Node | None], node: ir.Node, w: Window) -> fx.Node:
    """A convolution; padding that differs between the sides goes into an F.pad before it."""
    padding = [0] * len(w.kernel)
    if w.symmetric:
        padding = [int(p) for p in w.begins if not isinstance(p, fx.Node)]
    else:
        x = e.call(F.pad, x, pad_ends(w.begins, w.ends))
    options = {"stride": list(w.strides), "padding": padding, "dilation": list(w.dilations)}
    return e.call(_CONV[len(w.kernel)], x, *parts, **options, groups=attribute(node, "group", 1))


@emits("ConvTranspose")
def _conv_transpose(e: Emitter, node: ir.Node) -> fx.Node:
    """Padding that differs between the sides is cut off after the call."""
    kernel = kernel_of(e, node)
    n = len(kernel)
    extra = list(attribute(node, "output_padding", [0] * n))
    begins, ends = _cuts(e, node, kernel, extra)
    strides, dilations = list(attribute(node, "strides", [1] * n)), list(attribute(node, "dilations", [1] * n))
    if any(x >= max(s, d) for x, s, d in zip(extra, strides, dilations, strict=True)):
        raise refuse(node, "torch wants output_padding below stride or dilation; use pads instead")
    same = begins == ends and min(begins) >= 0
    options = {"stride": strides, "padding": begins if same else [0] * n, "output_padding": extra}
    options["groups"] = attribute(node, "group", 1)
    out = e.call(_TRANSPOSED[n], first(e, node), *weight_and_bias(e, node), **options, dilation=dilations)
    return out if same else e.call(F.pad, out, [-int(p) for p in pad_ends(begins, ends) if not isinstance(p, fx.Node)])


def _cuts(e: Emitter, node: ir.Node, kernel: Sequence[int], extra: Sequence[int]) -> tuple[list[int], list[int]]:
    """What a transposed convolution cuts off its full output on either side, per axis."""
    n, mode = len(kernel), attribute(node, "auto_pad", "NOTSET")
    shape = attribute(node, "output_shape")
    if shape is None and mode in ("NOTSET", "VALID"):
        pads = list(attribute(node, "pads", [0] * (2 * n))) if mode == "NOTSET" else [0] * (2 * n)
        return pads[:n], pads[n:]
    strides, dilations = attribute(node, "strides", [1] * n), attribute(node, "dilations", [1] * n)
    sizes = e.shape(node.inputs[0])
    if shape is not None and (sizes is None or None in sizes[2:]):
        raise refuse(node, "output_shape needs static spatial sizes; fix them, or use pads")
    begins, ends = [], []
    for k in range(n):
        reach = (kernel[k] - 1) * dilations[k] + 1
        total = reach + extra[k] - strides[k]
        if shape is not None and sizes is not None:
            total = strides[k] * ((sizes[2 + k] or 0) - 1) + extra[k] + reach - list(shape)[k - n]
        less, more = total // 2, total - total // 2
        begins.append(less if mode == "SAME_UPPER" else more)
        ends.append(more if mode == "SAME_UPPER" else less)
    return begins, ends
