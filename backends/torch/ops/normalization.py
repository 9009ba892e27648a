"""Normalizations.

BatchNormalization is written as `F.batch_norm(training=False)` with its four tensors under their own names, scale and
bias as parameters, mean and variance as buffers: the statistics stay as they are during fine-tuning. A module of its
own would rename the tensors.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import fx

from cipm_ir.backends.torch.emitter import Emitter, emits, refuse
from cipm_ir.backends.torch.ops.elementwise import arg, first
from cipm_ir.backends.torch.tensors import torch_dtype
from cipm_ir.ir.constants import attribute

__all__: list[str] = []


@emits("BatchNormalization")
def _batch_norm(e: Emitter, node: ir.Node) -> fx.Node:
    if attribute(node, "training_mode", 0) or attribute(node, "spatial", 1) == 0:
        raise refuse(node, "only inference over axis 1 is written; export the model in eval mode")
    x, scale, bias, mean, var = (e.value(v) for v in node.inputs if v is not None)
    eps = attribute(node, "epsilon", 1e-5)
    return e.call(F.batch_norm, x, mean, var, scale, bias, training=False, eps=eps)


def _normalized(e: Emitter, node: ir.Node) -> tuple[list[int], list[int] | None]:
    """The normalized axes, and their sizes where a scale of just that shape may go into the torch call."""
    x, scale = node.inputs[0], node.inputs[1]
    rank = e.rank(node, x)
    axis = attribute(node, "axis", -1) % rank
    shape, own = e.shape(scale), e.shape(x)
    axes = list(range(axis, rank))
    if shape is None or own is None or len(shape) != len(axes):
        return axes, None
    # A scale of size 1 broadcasts in ONNX: its shape tells the sizes only where the input's agree.
    fits = all(s is not None and s == n for s, n in zip(shape, own[axis:], strict=True))
    return axes, [s for s in shape if s is not None] if fits else None


def _with_scale(e: Emitter, out: fx.Node, node: ir.Node) -> fx.Node:
    scale, bias = arg(node, 1), arg(node, 2)
    if scale is not None:
        out = e.call(operator.mul, out, e.value(scale))
    return out if bias is None else e.call(operator.add, out, e.value(bias))


def _widened(e: Emitter, node: ir.Node) -> tuple[fx.Node, torch.dtype | None]:
    """The input in float32 where it is narrower (stash_type 1), and the type to return to."""
    kind, x = e.dtype(node, node.inputs[0]), first(e, node)
    narrow = kind in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) and attribute(node, "stash_type", 1) == 1
    return (e.method("to", x, torch.float32), torch_dtype(kind)) if narrow else (x, None)


def _spread(e: Emitter, x: fx.Node, axes: Sequence[int], eps: float) -> fx.Node:
    """1 / sqrt(mean of squares + eps)."""
    square = e.call(torch.mean, e.call(operator.mul, x, x), dim=list(axes), keepdim=True)
    return e.call(torch.rsqrt, e.call(operator.add, square, eps))


@emits("LayerNormalization")
def _layer_norm(e: Emitter, node: ir.Node) -> list[fx.Node]:
    axes, sizes = _normalized(e, node)
    eps = attribute(node, "epsilon", 1e-5)
    scale, bias = arg(node, 1), arg(node, 2)
    asked = any(v.name and (v.uses() or v.is_graph_output()) for v in node.outputs[1:])
    if sizes is not None and not asked and (bias is None or e.shape(bias) == tuple(sizes)):
        return [e.call(F.layer_norm, first(e, node), sizes, e.optional(scale), e.optional(bias), eps)]
    x, back = _widened(e, node)
    mean = e.call(torch.mean, x, dim=axes, keepdim=True)
    centred = e.call(operator.sub, x, mean)
    inverse = _spread(e, centred, axes, eps)
    out = e.call(operator.mul, centred, inverse)
    out = e.method("to", out, back) if back else out
    return [_with_scale(e, out, node), mean, inverse]


@emits("RMSNormalization", "SimplifiedLayerNormalization")
def _rms_norm(e: Emitter, node: ir.Node) -> fx.Node:
    axes, sizes = _normalized(e, node)
    eps = attribute(node, "epsilon", 1e-5)
    if sizes is not None:
        return e.call(F.rms_norm, first(e, node), sizes, e.optional(arg(node, 1)), eps)
    x, back = _widened(e, node)
    out = e.call(operator.mul, x, _spread(e, x, axes, eps))
    return _with_scale(e, e.method("to", out, back) if back else out, node)


@emits("GroupNormalization")
def _group_norm(e: Emitter, node: ir.Node) -> fx.Node:
    """Before operator set 21, scale and bias have one entry per group."""
    groups, eps = attribute(node, "num_groups"), attribute(node, "epsilon", 1e-5)
    x, scale, bias = (e.value(v) for v in node.inputs if v is not None)
    shape, own = e.shape(node.inputs[1]), e.shape(node.inputs[0])
    channels = None if own is None else own[1]
    if e.version < 21 and shape != (channels,):
        if channels is None:
            raise refuse(node, "the number of channels is unknown; run shape inference on the model first")
        scale, bias = (e.call(torch.repeat_interleave, v, channels // groups) for v in (scale, bias))
    return e.call(F.group_norm, x, groups, scale, bias, eps)


@emits("InstanceNormalization")
def _instance_norm(e: Emitter, node: ir.Node) -> fx.Node:
    x, scale, bias = (e.value(v) for v in node.inputs if v is not None)
    return e.call(F.instance_norm, x, weight=scale, bias=bias, eps=attribute(node, "epsilon", 1e-5))


@emits("LRN")
def _local_response_norm(e: Emitter, node: ir.Node) -> fx.Node:
    """An even window reaches one channel further up in ONNX, one further down in torch: flip the channels."""
    size = attribute(node, "size")
    options = {"alpha": attribute(node, "alpha", 1e-4), "beta": attribute(node, "beta", 0.75)}
    options["k"] = attribute(node, "bias", 1.0)
    if size % 2:
        return e.call(F.local_response_norm, first(e, node), size, **options)
    flipped = e.call(F.local_response_norm, e.call(torch.flip, first(e, node), [1]), size, **options)
    return e.call(torch.flip, flipped, [1])


@emits("LpNormalization")
def _lp_normalization(e: Emitter, node: ir.Node) -> fx.Node:
    tiny = torch.finfo(torch.float32).tiny
    power, axis = attribute(node, "p", 2), attribute(node, "axis", -1)
    return e.call(F.normalize, first(e, node), p=float(power), dim=axis, eps=tiny)


@emits("MeanVarianceNormalization")
def _mean_variance(e: Emitter, node: ir.Node) -> fx.Node:
    axes, x = list(attribute(node, "axes", [0, 2, 3])), first(e, node)
    centred = e.call(operator.sub, x, e.call(torch.mean, x, dim=axes, keepdim=True))
    variance = e.call(torch.mean, e.call(operator.mul, centred, centred), dim=axes, keepdim=True)
    return e.call(operator.truediv, centred, e.call(operator.add, e.call(torch.sqrt, variance), math.pow(10, -9)))
