"""Operators that join, cut, repeat and pad."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import fx

from cipm_ir.backends.torch.emitter import Emitter, Int, emits, refuse
from cipm_ir.backends.torch.ops.elementwise import arg, first, operands, ratio
from cipm_ir.backends.torch.ops.sizes import ceil_div, compute, maximum
from cipm_ir.ir.constants import attribute

__all__: list[str] = []

_FAR = 1 << 30


@emits("Concat")
def _concat(e: Emitter, node: ir.Node) -> fx.Node:
    return e.call(torch.cat, operands(e, node), dim=attribute(node, "axis", 1))


@emits("Split")
def _split(e: Emitter, node: ir.Node) -> list[fx.Node]:
    """Into given sizes, or into parts of ceil(size / number), the last one smaller."""
    v, axis = node.inputs[0], attribute(node, "axis", 0)
    assert v is not None
    sizes: Any = attribute(node, "split")
    if sizes is None and arg(node, 1) is not None:
        sizes = e.ints(arg(node, 1))
        if sizes is None:
            raise refuse(node, "its sizes are computed from data; make them a constant")
    if sizes is None:
        parts = attribute(node, "num_outputs") or len(node.outputs)
        sizes = ceil_div(e, e.size(v, axis), parts)
    made = e.call(torch.split, e.value(v), sizes, dim=axis)
    return [e.call(operator.getitem, made, k) for k in range(len(node.outputs))]


@emits("Tile")
def _tile(e: Emitter, node: ir.Node) -> fx.Node:
    repeats = e.ints(arg(node, 1))
    if repeats is None or len(node.inputs) > 2:
        raise refuse(node, "its repeats are computed from data; make them a constant")
    return e.method("repeat", first(e, node), repeats)


# ---------------------------------------------------------------- Slice
@emits("Slice")
def _slice(e: Emitter, node: ir.Node) -> fx.Node:
    v = node.inputs[0]
    assert v is not None
    x, rank = e.value(v), e.rank(node, v)
    index: list[Any] = [slice(None)] * rank
    for axis, start, end, step in _bounds(e, node, rank):
        if not isinstance(step, fx.Node) and step > 0:
            index[axis] = slice(_begin(start), _end(end), None if step == 1 else step)
        elif isinstance(step, fx.Node):
            raise refuse(node, "its step is computed at run time; make it a constant")
        else:
            x = e.call(torch.flip, x, [axis])
            index[axis] = _reversed(e, v, axis, start, end, -step)
    while index and index[-1] == slice(None):
        index.pop()
    return e.call(operator.getitem, x, tuple(index)) if index else x


def _begin(n: Int) -> Int | None:
    return None if not isinstance(n, fx.Node) and (n == 0 or n < -_FAR) else n


def _end(n: Int) -> Int | None:
    return None if not isinstance(n, fx.Node) and n > _FAR else n


def _bounds(e: Emitter, node: ir.Node, rank: int) -> list[tuple[int, Int, Int, Int]]:
    if e.version < 10:
        starts: list[Int] | None = list(attribute(node, "starts"))
        ends: list[Int] | None = list(attribute(node, "ends"))
        axes: list[Int] | None = attribute(node, "axes")
        steps: list[Int] | None = None
    else:
        starts, ends, axes, steps = (e.ints(arg(node, k)) for k in (1, 2, 3, 4))
    if starts is None or ends is None or (axes is None and arg(node, 3)) or (steps is None and arg(node, 4)):
        raise refuse(node, "its bounds are computed from data; make them constants or derive them from shapes")
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    rows = zip(axes, starts, ends, steps, strict=True)
    return [(int(a) % rank, s, t, d) for a, s, t, d in rows if not isinstance(a, fx.Node)]


def _reversed(e: Emitter, v: ir.Value, axis: int, start: Int, end: Int, step: int) -> slice:
    """The slice of the flipped axis that a negative step takes: position p becomes size - 1 - p."""

    def mirrored(position: Int) -> Int:
        if not isinstance(position, fx.Node) and position < 0:
            return -1 - position
        last = compute(e, operator.sub, e.size(v, axis), 1)
        return maximum(e, compute(e, operator.sub, last, position), 0)

    far = not isinstance(end, fx.Node) and end < -_FAR
    begin = 0 if not isinstance(start, fx.Node) and start > _FAR else mirrored(start)
    return slice(_begin(begin), None if far else mirrored(end), None if step == 1 else step)


# ---------------------------------------------------------------- Pad
_MODES = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}


@emits("Pad")
def _pad(e: Emitter, node: ir.Node) -> fx.Node:
    rank, mode = e.rank(node, node.inputs[0]), attribute(node, "mode", "constant")
    begins, ends = _pads(e, node, rank)
    if mode != "constant":
        return _pad_from_data(e, node, begins, ends, mode)
    number = attribute(node, "value", 0.0) if e.version < 11 else ratio(e, arg(node, 2), 0)
    if number is None:
        raise refuse(node, "its fill value is computed at run time; make it a constant")
    flat = [p for k in reversed(range(rank)) for p in (begins[k], ends[k])]
    while len(flat) > 2 and flat[-2:] == [0, 0]:
        del flat[-2:]
    return e.call(F.pad, first(e, node), flat, value=number)


def _pads(e: Emitter, node: ir.Node, rank: int) -> tuple[list[Int], list[Int]]:
    given = list(attribute(node, "pads")) if e.version < 11 else e.ints(arg(node, 1))
    if given is None:
        raise refuse(node, "its pads are computed from data; make them a constant")
    axes = e.constant(arg(node, 3))
    chosen = list(range(rank)) if axes is None else [int(a) % rank for a in axes.ravel()]
    begins: list[Int] = [0] * rank
    ends: list[Int] = [0] * rank
    for k, axis in enumerate(chosen):
        begins[axis], ends[axis] = given[k], given[len(chosen) + k]
    return begins, ends


def _pad_from_data(e: Emitter, node: ir.Node, begins: Sequence[Int], ends: Sequence[Int], mode: str) -> fx.Node:
    """F.pad on the last axes of an image; elsewhere positions are gathered, which needs static sizes."""
    x, rank = first(e, node), len(begins)
    padded = [k for k in range(rank) if begins[k] != 0 or ends[k] != 0]
    if 3 <= rank <= 5 and padded and min(padded) >= 2:
        flat = [p for k in reversed(range(2, rank)) for p in (begins[k], ends[k])]
        return e.call(F.pad, x, flat, mode=_MODES[mode])
    sizes = e.shape(node.inputs[0])
    for k in padded:
        size, before, after = None if sizes is None else sizes[k], begins[k], ends[k]
        if size is None or isinstance(before, fx.Node) or isinstance(after, fx.Node) or min(before, after) < 0:
            raise refuse(node, f"{mode} padding of axis {k} needs a static size and padding of at least 0")
        positions = np.pad(np.arange(size), (before, after), mode=mode)  # type: ignore[call-overload]
        x = e.call(torch.index_select, x, k, e.buffer(positions, "positions"))
    return x
