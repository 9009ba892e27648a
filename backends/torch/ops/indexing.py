"""Operators that select by index."""

from __future__ import annotations

import operator
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from cipm_ir.backends.torch.emitter import Emitter, emits, refuse
from cipm_ir.backends.torch.ops.elementwise import arg, first, operands
from cipm_ir.ir.constants import attribute

__all__: list[str] = []


@emits("Gather")
def _gather(e: Emitter, node: ir.Node) -> fx.Node:
    """Indexing with a tensor: the same rule for any rank of the indices, and negative ones count from the end."""
    axis, index = attribute(node, "axis", 0), node.inputs[1]
    assert index is not None
    found = e.constant(index)
    if found is not None and found.ndim == 0:
        return e.call(torch.select, first(e, node), axis, int(found))
    single = e.ints(index) if found is None else None
    if single is not None and len(single) == 1 and e.shape(index) == ():
        return e.call(torch.select, first(e, node), axis, single[0])
    if found is not None and found.ndim == 1 and (found >= 0).all():
        return e.call(torch.index_select, first(e, node), axis, e.value(index))
    if axis < 0:
        axis += e.rank(node, node.inputs[0])
    return e.call(operator.getitem, first(e, node), (slice(None),) * axis + (e.value(index),))


def _wrapped(e: Emitter, node: ir.Node, axis: int) -> fx.Node:
    """Indices along an axis of the first input as int64, negative ones counted from the end."""
    data, index = node.inputs[0], node.inputs[1]
    assert data is not None and index is not None
    found, out = e.constant(index), e.value(index)
    if e.dtype(node, index) != ir.DataType.INT64:
        out = e.method("to", out, torch.int64)
    if found is not None and (found >= 0).all():
        return out
    rank = e.rank(node, data)
    return e.call(torch.remainder, out, e.size(data, axis % rank))


@emits("GatherElements")
def _gather_elements(e: Emitter, node: ir.Node) -> fx.Node:
    axis = attribute(node, "axis", 0)
    return e.call(torch.gather, first(e, node), axis, _wrapped(e, node, axis))


def _columns(e: Emitter, node: ir.Node) -> list[fx.Node]:
    """The coordinates that the last axis of the indices holds, one tensor each."""
    index = node.inputs[1]
    shape = e.shape(index)
    if index is None or shape is None or shape[-1] is None:
        raise refuse(node, "the length of its index tuples is unknown; run shape inference on the model first")
    return [e.call(torch.select, e.value(index), -1, k) for k in range(shape[-1])]


@emits("GatherND")
def _gather_nd(e: Emitter, node: ir.Node) -> fx.Node:
    batch, v = attribute(node, "batch_dims", 0), node.inputs[0]
    assert v is not None
    index = _columns(e, node)
    width = e.rank(node, node.inputs[1]) - 1
    own: list[Any] = []
    for k in range(batch):
        line = e.call(torch.arange, e.size(v, k), **e.device())
        own.append(e.call(torch.reshape, line, [-1 if a == k else 1 for a in range(width)]))
    return e.call(operator.getitem, e.value(v), (*own, *index))


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@emits("ScatterElements", "Scatter")
def _scatter_elements(e: Emitter, node: ir.Node) -> fx.Node:
    axis, kind, updates = attribute(node, "axis", 0), attribute(node, "reduction", "none"), node.inputs[2]
    assert updates is not None
    index = _wrapped(e, node, axis)
    if kind == "none":
        return e.call(torch.scatter, first(e, node), axis, index, e.value(updates))
    return e.call(torch.scatter_reduce, first(e, node), axis, index, e.value(updates), reduce=_REDUCTIONS[kind])


@emits("ScatterND")
def _scatter_nd(e: Emitter, node: ir.Node) -> fx.Node:
    kind, updates = attribute(node, "reduction", "none"), node.inputs[2]
    assert updates is not None
    if kind not in ("none", "add"):
        raise refuse(node, f"torch has no index_put with reduction {kind!r}; use ScatterElements")
    return e.call(torch.index_put, first(e, node), _columns(e, node), e.value(updates), accumulate=kind == "add")


@emits("Compress")
def _compress(e: Emitter, node: ir.Node) -> fx.Node:
    """Without an axis, on the flattened input."""
    x, condition = operands_of_compress(e, node)
    axis = attribute(node, "axis")
    x = e.call(torch.flatten, x) if axis is None else x
    chosen = e.call(torch.flatten, e.call(torch.nonzero, condition))
    return e.call(torch.index_select, x, 0 if axis is None else axis, chosen)


def operands_of_compress(e: Emitter, node: ir.Node) -> tuple[fx.Node, fx.Node]:
    """Data and condition."""
    condition = node.inputs[1]
    assert condition is not None
    return first(e, node), e.value(condition)


@emits("NonZero")
def _nonzero(e: Emitter, node: ir.Node) -> fx.Node:
    return e.call(torch.transpose, e.call(torch.nonzero, first(e, node)), 0, 1)


@emits("Trilu")
def _triangle(e: Emitter, node: ir.Node) -> fx.Node:
    entries = [0] if arg(node, 1) is None else e.ints(arg(node, 1))
    if entries is None:
        raise refuse(node, "its diagonal is computed from data; make it a constant")
    return e.call(torch.triu if attribute(node, "upper", 1) else torch.tril, first(e, node), entries[0])


@emits("ReverseSequence")
def _reverse_sequence(e: Emitter, node: ir.Node) -> fx.Node:
    """Position t of sequence b comes from length[b] - 1 - t, from t itself behind the end."""
    time, batch = attribute(node, "time_axis", 0), attribute(node, "batch_axis", 1)
    v, rank = node.inputs[0], e.rank(node, node.inputs[0])
    assert v is not None and node.inputs[1] is not None
    steps = e.call(torch.arange, e.size(v, time), **e.device())
    steps = e.call(torch.reshape, steps, [-1 if a == time else 1 for a in range(rank)])
    lengths = e.call(torch.reshape, e.value(node.inputs[1]), [-1 if a == batch else 1 for a in range(rank)])
    mirrored = e.call(operator.sub, e.call(operator.sub, lengths, 1), steps)
    index = e.call(torch.where, e.call(torch.lt, steps, lengths), mirrored, steps)
    return e.call(torch.take_along_dim, e.value(v), index, time)


@emits("OneHot")
def _one_hot(e: Emitter, node: ir.Node) -> fx.Node:
    """Compared with 0 .. depth - 1 and with the same minus depth: negative indices count from the end."""
    index, values = node.inputs[0], node.inputs[2]
    depth = e.ints(node.inputs[1])
    assert index is not None and values is not None
    if depth is None:
        raise refuse(node, "its depth is computed from data; make it a constant")
    rank = e.rank(node, index) + 1
    axis = attribute(node, "axis", -1) % rank
    classes = e.call(torch.reshape, e.call(torch.arange, depth[0], **e.device()), [-1] + [1] * (rank - 1 - axis))
    spread = e.call(torch.unsqueeze, e.value(index), axis)
    hit = e.call(torch.eq, spread, classes)
    hit = e.call(torch.logical_or, hit, e.call(torch.eq, e.call(operator.add, spread, depth[0]), classes))
    off, on = (e.call(torch.select, e.value(values), 0, k) for k in (0, 1))
    return e.call(torch.where, hit, on, off)


@emits("Unique")
def _unique(e: Emitter, node: ir.Node) -> list[fx.Node | None]:
    if not attribute(node, "sorted", 1):
        raise refuse(node, "torch returns unique entries sorted only; set sorted=1")
    axis = attribute(node, "axis")
    options = {} if axis is None else {"dim": axis}
    found = e.call(torch.unique, *operands(e, node)[:1], return_inverse=True, return_counts=True, **options)
    values, inverse, counts = (e.call(operator.getitem, found, k) for k in range(3))
    return [values, None, e.call(torch.flatten, inverse), counts]
