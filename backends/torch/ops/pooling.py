"""Pools.

torch pads both sides alike, by half the window at most, and its ceil mode drops windows that start in the padding, as
ONNX does. Everything else is padded explicitly, and the number of windows is then fixed by the padding.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import fx

from cipm_ir.backends.torch.emitter import Emitter, emits, refuse
from cipm_ir.backends.torch.ops.convolution import Window, pad_ends, window
from cipm_ir.backends.torch.ops.elementwise import first
from cipm_ir.ir.constants import attribute

__all__: list[str] = []

_MAX: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE: dict[int, Callable[..., Any]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _window(e: Emitter, node: ir.Node) -> Window:
    kernel = attribute(node, "kernel_shape")
    if len(kernel) > 3:
        raise refuse(node, "torch has pools over one to three axes only")
    return window(e, node, kernel)


def _direct(w: Window) -> bool:
    """Whether torch's own padding can do it."""
    pairs = zip(w.begins, w.kernel, strict=True)
    return w.symmetric and all(not isinstance(p, fx.Node) and 2 * p <= k for p, k in pairs)


def _overhang(e: Emitter, node: ir.Node, w: Window) -> list[int]:
    """What has to be added behind each axis, so that counting rounded down gives the windows of the ceil mode."""
    sizes = e.shape(node.inputs[0])
    if sizes is None or None in sizes[2:] or any(isinstance(p, fx.Node) for p in (*w.begins, *w.ends)):
        raise refuse(node, "ceil_mode with this padding needs static spatial sizes; fix the input shape")
    extra = []
    for k, size in enumerate(sizes[2:]):
        assert size is not None
        begin, end = int(w.begins[k]), int(w.ends[k])  # type: ignore[arg-type]
        free = size + begin + end - w.reach[k]
        windows = math.ceil(free / w.strides[k]) + 1
        if (windows - 1) * w.strides[k] >= size + begin:
            windows -= 1
        extra.append(max((windows - 1) * w.strides[k] - free, 0))
    return extra


@emits("MaxPool")
def _max_pool(e: Emitter, node: ir.Node) -> fx.Node:
    w, x = _window(e, node), first(e, node)
    ceil = bool(attribute(node, "ceil_mode", 0))
    options: dict[str, Any] = {"dilation": list(w.dilations)}
    if _direct(w):
        options.update(padding=list(w.begins), ceil_mode=ceil)
    else:
        kind = e.dtype(node, node.inputs[0])
        lowest: float = -math.inf if kind.is_floating_point() else int(np.iinfo(kind.numpy()).min)
        extra = _overhang(e, node, w) if ceil else [0] * len(w.kernel)
        ends = [_plus(end, more) for end, more in zip(w.ends, extra, strict=True)]
        x = e.call(F.pad, x, pad_ends(w.begins, ends), value=lowest)
    return e.call(_MAX[len(w.kernel)], x, list(w.kernel), list(w.strides), **options)


def _plus(a: int | fx.Node, b: int) -> int | fx.Node:
    return a if b == 0 or isinstance(a, fx.Node) else a + b


@emits("AveragePool")
def _average_pool(e: Emitter, node: ir.Node) -> fx.Node:
    w, x = _window(e, node), first(e, node)
    if set(w.dilations) != {1}:
        raise refuse(node, "torch has no dilated average pool; write it as a depthwise Conv")
    counted, ceil = bool(attribute(node, "count_include_pad", 0)), bool(attribute(node, "ceil_mode", 0))
    pool, kernel, strides = _AVERAGE[len(w.kernel)], list(w.kernel), list(w.strides)
    if _direct(w):
        options: dict[str, Any] = {"padding": list(w.begins), "ceil_mode": ceil, "count_include_pad": counted}
        return e.call(pool, x, kernel, strides, **options)
    extra = _overhang(e, node, w) if ceil else [0] * len(w.kernel)
    own, behind = pad_ends(w.begins, w.ends), pad_ends([0] * len(extra), extra)
    ones = e.call(torch.ones_like, e.call(operator.getitem, x, (slice(0, 1), slice(0, 1))))
    ones = e.call(F.pad, ones, own, value=1.0 if counted else 0.0)
    x = e.call(F.pad, x, own)
    if any(extra):
        x, ones = e.call(F.pad, x, behind), e.call(F.pad, ones, behind)
    # Each average is over the whole window; dividing by the average of ones leaves the entries that count.
    return e.call(operator.truediv, e.call(pool, x, kernel, strides), e.call(pool, ones, kernel, strides))


@emits("LpPool")
def _lp_pool(e: Emitter, node: ir.Node) -> fx.Node:
    w, power = _window(e, node), attribute(node, "p", 2)
    if set(w.dilations) != {1} or attribute(node, "ceil_mode", 0):
        raise refuse(node, "torch has no LpPool with dilation or ceil mode; write it as Pow and Conv")
    x = e.call(F.pad, first(e, node), pad_ends(w.begins, w.ends))
    powers = e.call(torch.pow, e.call(torch.abs, x), power)
    sums = e.call(_AVERAGE[len(w.kernel)], powers, list(w.kernel), list(w.strides))
    return e.call(torch.pow, e.call(operator.mul, sums, math.prod(w.kernel)), 1.0 / power)


def _spatial(e: Emitter, node: ir.Node) -> list[int]:
    return list(range(2, e.rank(node, node.inputs[0])))


@emits("GlobalAveragePool")
def _global_average(e: Emitter, node: ir.Node) -> fx.Node:
    return e.call(torch.mean, first(e, node), dim=_spatial(e, node), keepdim=True)


@emits("GlobalMaxPool")
def _global_max(e: Emitter, node: ir.Node) -> fx.Node:
    return e.call(torch.amax, first(e, node), dim=_spatial(e, node), keepdim=True)


@emits("GlobalLpPool")
def _global_lp(e: Emitter, node: ir.Node) -> fx.Node:
    power = attribute(node, "p", 2)
    return e.call(torch.linalg.vector_norm, first(e, node), power, dim=_spatial(e, node), keepdim=True)
