"""Reductions, softmax and what depends on order along an axis."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import fx

from cipm_ir.backends.torch.emitter import Emitter, Int, emits, refuse
from cipm_ir.backends.torch.ops.elementwise import arg, first, ratio
from cipm_ir.backends.torch.tensors import torch_dtype
from cipm_ir.ir.constants import attribute

__all__ = ["constant_axes"]

Reduce = Callable[[Emitter, fx.Node, list[int], bool, dict[str, Any]], fx.Node]


def constant_axes(e: Emitter, node: ir.Node, k: int = 1) -> list[int] | None:
    """Axes from the attribute or from input k; None where none are given. UnsupportedError where they vary."""
    if "axes" in node.attributes:
        return list(attribute(node, "axes"))
    given = arg(node, k)
    if given is None:
        return None
    found = e.constant(given)
    if found is None:
        raise refuse(node, "its axes are computed at run time; make them a constant")
    return [int(a) for a in found.ravel()]


def _sum(e: Emitter, x: fx.Node, axes: list[int], keep: bool, kind: dict[str, Any]) -> fx.Node:
    return e.call(torch.sum, x, dim=axes, keepdim=keep, **kind)


def _product(e: Emitter, x: fx.Node, axes: list[int], keep: bool, kind: dict[str, Any]) -> fx.Node:
    for axis in sorted(axes, reverse=True):
        x = e.call(torch.prod, x, dim=axis, keepdim=keep, **kind)
    return x


def _square_sum(e: Emitter, x: fx.Node, axes: list[int], keep: bool, kind: dict[str, Any]) -> fx.Node:
    return _sum(e, e.call(operator.mul, x, x), axes, keep, kind)


def _plain(function: Callable[..., Any]) -> Reduce:
    return lambda e, x, axes, keep, kind: e.call(function, x, dim=axes, keepdim=keep)


_REDUCE: dict[str, Reduce] = {
    "ReduceSum": _sum,
    "ReduceMean": _plain(torch.mean),
    "ReduceMax": _plain(torch.amax),
    "ReduceMin": _plain(torch.amin),
    "ReduceProd": _product,
    "ReduceL1": lambda e, x, axes, keep, kind: _sum(e, e.call(torch.abs, x), axes, keep, kind),
    "ReduceL2": lambda e, x, axes, keep, kind: e.call(torch.linalg.vector_norm, x, 2, dim=axes, keepdim=keep),
    "ReduceLogSum": lambda e, x, axes, keep, kind: e.call(torch.log, _sum(e, x, axes, keep, kind)),
    "ReduceLogSumExp": _plain(torch.logsumexp),
    "ReduceSumSquare": _square_sum,
}
_FLOAT_ONLY = ("ReduceMean", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp")


@emits(*_REDUCE)
def _reduce(e: Emitter, node: ir.Node) -> fx.Node:
    axes = constant_axes(e, node)
    if not axes and attribute(node, "noop_with_empty_axes", 0):
        if node.op_type not in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd"):
            raise refuse(node, "with no axes it is elementwise; write the elementwise operator")
        return first(e, node)
    rank = e.rank(node, node.inputs[0])
    chosen = [a % rank for a in axes] if axes else list(range(rank))
    if not chosen and rank == 0 and node.op_type in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd"):
        return first(e, node)
    kind = e.dtype(node, node.inputs[0])
    if kind.is_integer() and node.op_type in _FLOAT_ONLY:
        raise refuse(node, "torch reduces integers this way in float only; cast the input to float")
    options = {"dtype": torch_dtype(kind)} if kind.is_integer() else {}
    return _REDUCE[node.op_type](e, first(e, node), chosen, bool(attribute(node, "keepdims", 1)), options)


@emits("ArgMax", "ArgMin")
def _arg_extreme(e: Emitter, node: ir.Node) -> fx.Node:
    """The first of equals, or the last where select_last_index says so: then along the reversed axis."""
    function = torch.argmax if node.op_type == "ArgMax" else torch.argmin
    x, axis, keep = first(e, node), attribute(node, "axis", 0), bool(attribute(node, "keepdims", 1))
    if not attribute(node, "select_last_index", 0):
        return e.call(function, x, dim=axis, keepdim=keep)
    assert node.inputs[0] is not None
    last = e.call(operator.sub, e.size(node.inputs[0], axis % e.rank(node, node.inputs[0])), 1)
    return e.call(operator.sub, last, e.call(function, e.call(torch.flip, x, [axis]), dim=axis, keepdim=keep))


@emits("TopK")
def _top_k(e: Emitter, node: ir.Node) -> list[fx.Node]:
    """By a stable sort: among equals ONNX takes the lower index, torch.topk any."""
    axis, largest = attribute(node, "axis", -1), bool(attribute(node, "largest", 1))
    count: Int | None = attribute(node, "k")
    if count is None:
        entries = e.ints(arg(node, 1))
        if entries is None:
            raise refuse(node, "k is computed at run time; make it a constant")
        count = entries[0]
    found = e.call(torch.sort, first(e, node), dim=axis, descending=largest, stable=True)
    parts = [e.call(operator.getitem, found, k) for k in (0, 1)]
    return [e.call(torch.narrow, part, axis, 0, count) for part in parts]


@emits("CumSum")
def _cumulative_sum(e: Emitter, node: ir.Node) -> fx.Node:
    axis = ratio(e, arg(node, 1))
    if axis is None:
        raise refuse(node, "its axis is computed at run time; make it a constant")
    axis, x, kind = int(axis), first(e, node), e.dtype(node, node.inputs[0])
    reverse = attribute(node, "reverse", 0)
    x = e.call(torch.flip, x, [axis]) if reverse else x
    out = e.call(torch.cumsum, x, dim=axis, dtype=torch_dtype(kind))
    if attribute(node, "exclusive", 0):
        # Shifted rather than subtracted: x + y - y is not x in floating point.
        start = e.call(torch.zeros_like, e.call(torch.narrow, x, axis, 0, 1))
        assert node.inputs[0] is not None
        length = e.call(operator.sub, e.size(node.inputs[0], axis), 1)
        out = e.call(torch.cat, [start, e.call(torch.narrow, out, axis, 0, length)], dim=axis)
    return e.call(torch.flip, out, [axis]) if reverse else out


def _along(e: Emitter, node: ir.Node, function: Callable[[fx.Node, int], fx.Node]) -> fx.Node:
    """Apply along an axis; before operator set 13, along all axes from it on together."""
    x, v = first(e, node), node.inputs[0]
    if e.version >= 13:
        return function(x, attribute(node, "axis", -1))
    assert v is not None
    rank = e.rank(node, v)
    axis = attribute(node, "axis", 1) % rank
    if axis == rank - 1:
        return function(x, axis)
    sizes = [e.size(v, a) for a in range(rank)]
    return e.call(torch.reshape, function(e.call(torch.flatten, x, axis), -1), sizes)


@emits("Softmax")
def _softmax(e: Emitter, node: ir.Node) -> fx.Node:
    return _along(e, node, lambda x, axis: e.call(F.softmax, x, dim=axis))


@emits("LogSoftmax")
def _log_softmax(e: Emitter, node: ir.Node) -> fx.Node:
    return _along(e, node, lambda x, axis: e.call(F.log_softmax, x, dim=axis))


@emits("Hardmax")
def _hardmax(e: Emitter, node: ir.Node) -> fx.Node:
    def apply(x: fx.Node, axis: int) -> fx.Node:
        winner = e.call(torch.argmax, x, dim=axis, keepdim=True)
        return e.call(torch.scatter, e.call(torch.zeros_like, x), axis, winner, 1.0)

    return _along(e, node, apply)
