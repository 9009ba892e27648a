"""Operators that give the same entries another shape."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TypeGuard

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import fx

from cipm_ir.backends.torch.emitter import Emitter, Int, emits, refuse
from cipm_ir.backends.torch.ops.elementwise import arg, first
from cipm_ir.backends.torch.ops.reduction import constant_axes
from cipm_ir.backends.torch.ops.sizes import compute, multiply
from cipm_ir.ir.constants import attribute

__all__: list[str] = []


@emits("Reshape")
def _reshape(e: Emitter, node: ir.Node) -> fx.Node:
    """A 0 in the target copies the size of the input, unless allowzero says that it is meant."""
    x = node.inputs[0]
    target: list[Int] | None = attribute(node, "shape") or e.ints(arg(node, 1))
    if x is None or target is None:
        raise refuse(node, "its target shape is computed from data; make it a constant or derive it from shapes")
    copies = not attribute(node, "allowzero", 0)
    sizes = [e.size(x, k) if copies and n == 0 and not isinstance(n, fx.Node) else n for k, n in enumerate(target)]
    return e.call(torch.reshape, e.value(x), sizes)


@emits("Flatten")
def _flatten(e: Emitter, node: ir.Node) -> fx.Node:
    v, x = node.inputs[0], first(e, node)
    assert v is not None
    axis, rank = attribute(node, "axis", 1), e.rank(node, v)
    axis += rank if axis < 0 else 0
    if axis == 1 and rank > 1:
        return e.call(torch.flatten, x, 1)
    front: list[Int] = [e.size(v, a) for a in range(axis)]
    return e.call(torch.reshape, x, [-1, 1] if axis == rank else [multiply(e, front), -1])


@emits("Squeeze")
def _squeeze(e: Emitter, node: ir.Node) -> fx.Node:
    axes = constant_axes(e, node)
    return e.call(torch.squeeze, first(e, node), *([] if axes is None else [tuple(axes)]))


@emits("Unsqueeze")
def _unsqueeze(e: Emitter, node: ir.Node) -> fx.Node:
    axes, x = constant_axes(e, node) or [], first(e, node)
    if len(axes) > 1 and min(axes) < 0:
        rank = e.rank(node, node.inputs[0]) + len(axes)
        axes = [a % rank for a in axes]
    for axis in sorted(axes):
        x = e.call(torch.unsqueeze, x, axis)
    return x


@emits("Transpose")
def _transpose(e: Emitter, node: ir.Node) -> fx.Node:
    order = attribute(node, "perm") or list(reversed(range(e.rank(node, node.inputs[0]))))
    return e.call(torch.permute, first(e, node), list(order))


@emits("Expand")
def _expand(e: Emitter, node: ir.Node) -> fx.Node:
    """ONNX broadcasts both ways: a 1 in the target keeps the input's size."""
    x, target = node.inputs[0], e.ints(arg(node, 1))
    if x is None or target is None:
        raise refuse(node, "its target shape is computed from data; make it a constant or derive it from shapes")
    own = e.shape(x)
    e.rank(node, x)
    assert own is not None
    width = max(len(own), len(target))
    data = e.value(x)
    # The input's own size, asked for and given back, keeps the axis.
    own_size = [n.args == (data, k + len(own) - len(target)) if _asks_size(n) else False for k, n in enumerate(target)]
    target = [1 if same else n for n, same in zip(target, own_size, strict=True)]
    sizes = [_expanded(own, target, k - width) for k in range(width)]
    if None not in sizes:
        return e.method("expand", data, sizes)
    both = e.call(torch.broadcast_shapes, e.call(getattr, data, "shape"), target)
    return e.method("expand", data, both)


def _asks_size(n: Int) -> TypeGuard[fx.Node]:
    return isinstance(n, fx.Node) and n.op == "call_method" and n.target == "size"


def _expanded(own: Sequence[int | None], target: Sequence[Int], k: int) -> Int | None:
    """Size to expand to on axis k (negative), -1 to keep it; None where only the run can tell."""
    if -k > len(target):
        return -1
    wanted = target[k]
    if -k > len(own):
        return wanted
    size = own[k]
    if not isinstance(wanted, fx.Node):  # a size that is open may be 1 in a run, whatever fits elsewhere
        return -1 if wanted == 1 else wanted
    if size == 1:
        return wanted
    return -1 if size is not None else None


@emits("DepthToSpace")
def _depth_to_space(e: Emitter, node: ir.Node) -> fx.Node:
    block, v = attribute(node, "blocksize"), node.inputs[0]
    if attribute(node, "mode", "DCR") == "CRD":
        return e.call(F.pixel_shuffle, first(e, node), block)
    assert v is not None
    n, c, h, w = (e.size(v, a) for a in range(4))
    split = e.call(torch.reshape, e.value(v), [n, block, block, _over(e, c, block * block), h, w])
    moved = e.call(torch.permute, split, [0, 3, 4, 1, 5, 2])
    sizes = [n, _over(e, c, block * block), _times(e, h, block), _times(e, w, block)]
    return e.call(torch.reshape, moved, sizes)


@emits("SpaceToDepth")
def _space_to_depth(e: Emitter, node: ir.Node) -> fx.Node:
    block, v = attribute(node, "blocksize"), node.inputs[0]
    assert v is not None
    if attribute(node, "mode", "DCR") == "CRD":
        return e.call(F.pixel_unshuffle, e.value(v), block)
    n, c, h, w = (e.size(v, a) for a in range(4))
    down, across = _over(e, h, block), _over(e, w, block)
    split = e.call(torch.reshape, e.value(v), [n, c, down, block, across, block])
    moved = e.call(torch.permute, split, [0, 3, 5, 1, 2, 4])
    return e.call(torch.reshape, moved, [n, _times(e, c, block * block), down, across])


def _over(e: Emitter, a: Int, b: int) -> Int:
    return compute(e, operator.floordiv, a, b)


def _times(e: Emitter, a: Int, b: int) -> Int:
    return compute(e, operator.mul, a, b)
