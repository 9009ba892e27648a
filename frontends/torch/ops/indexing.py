"""Lowering of selections: indices, slices, lookups, gathers and scatters, masks by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.frontends.torch.ops.shaping import END, run_of, shape_value, with_axes, with_size
from cipm_ir.frontends.torch.table import computes, lowers
from cipm_ir.frontends.torch.values import Dims, Lowering, Number, Operand, Tensor, known

Bound = int | Number | None


# ---------------------------------------------------------------- slices
def _length(size: int | None, start: Bound, end: Bound, step: int) -> int | None:
    start, end = (x.hint if isinstance(x, Number) else x for x in (start, end))  # type: ignore[assignment]
    if size is None or start is None or end is None:
        return None
    assert isinstance(start, int) and isinstance(end, int)
    return len(range(*slice(start, end, step).indices(size)))


def sliced(b: Lowering, x: Tensor, axis: int, start: Bound, end: Bound, step: Any = 1) -> Tensor:
    """x[start:end:step] along an axis; the tensor itself where that is all of it."""
    start, end, step = (0 if start is None else start), (END if end is None else end), int(known(step or 1))
    if type(start) is int and start == 0 and step == 1 and type(end) is int and end == END:
        return x
    return run_of(b, x, axis, start, end, step, with_size(x.dims, axis, _length(x.dims[axis], start, end, step)))


def picked(b: Lowering, x: Tensor, axis: int, index: int | Number) -> Tensor:
    """x[index] along an axis, which goes."""
    place: Operand = index if isinstance(index, Number) else b.const(index, torch.int64)
    return b.op("Gather", x, place, axis=axis, shape=(*x.dims[:axis], *x.dims[axis + 1 :]))


@lowers("slice", "slice_copy", view=True)
def slice_(b: Lowering, input: Tensor, dim: int = 0, start: Bound = None, end: Bound = None, step: Any = 1) -> Tensor:
    return sliced(b, input, b.axis(input, dim), start, end, step)


@lowers("narrow", view=True)
def narrow(b: Lowering, input: Tensor, dim: int, start: Any, length: Any) -> Tensor:
    if isinstance(start, Tensor):
        raise UnsupportedPattern("a start that depends on data")
    axis = b.axis(input, dim)
    if isinstance(start, Number) or isinstance(length, Number):
        end = b.op("Add", b.ints([start]), b.ints([length]), shape=(1,))
        first, dims = b.ints([start]), np.asarray([axis], np.int64)
        return b.op("Slice", input, first, end, dims, shape=b.shape)
    start = start + input.dims[axis] if start < 0 else start
    return run_of(b, input, axis, start, start + length, shape=b.shape)


@lowers("select", "select_copy", view=True)
def select(b: Lowering, input: Tensor, dim: int, index: int | Number) -> Tensor:
    return picked(b, input, b.axis(input, dim), index)


# ---------------------------------------------------------------- x[...]
def indexed(b: Lowering, x: Tensor, index: Any) -> Tensor:
    """x[index]: numbers, slices, None, Ellipsis, tensors of positions and lists of such.

    Numbers and slices go first, as torch has it; what is left are tensors of positions, taken together.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    taken = sum(1 for i in items if i is not None and i is not Ellipsis)
    fill: list[Any] = [slice(None)] * (x.rank - taken)
    at = next((k for k, i in enumerate(items) if i is Ellipsis), len(items))
    items[at : at + 1] = fill
    tensors: list[Tensor | None] = []
    axis = 0
    for item in items:
        if item is None:
            x = with_axes(b, x, [axis])
        elif isinstance(item, slice):
            x = sliced(b, x, axis, item.start, item.stop, item.step)
        elif isinstance(item, Number) or type(item) is int:
            x = picked(b, x, axis, item)
            continue
        else:
            tensors.extend([None] * (axis - len(tensors)))
            tensors.append(picked_positions(b, item))
        axis += 1
    return gathered(b, x, tensors) if tensors else x


def picked_positions(b: Lowering, item: Any) -> Tensor:
    if isinstance(item, list | tuple | range):
        array = np.asarray(list(item))
        if array.dtype == np.int64:
            return b.const(array)
    if not isinstance(item, Tensor):
        raise UnsupportedPattern(f"an index of type {type(item).__name__}")
    if item.dtype in (torch.bool, torch.uint8):
        raise UnsupportedPattern("a mask that selects entries: their number depends on data")
    return item if item.dtype == torch.int64 else b.cast(item, torch.int64)


@lowers("aten.index", "_unsafe_index")
def index(b: Lowering, input: Tensor, indices: Sequence[Any]) -> Tensor:
    return gathered(b, input, [None if i is None else picked_positions(b, i) for i in indices])


def gathered(b: Lowering, x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """Entries at positions: one tensor of them is a Gather; several broadcast together, and index their axes first."""
    axes = [a for a, i in enumerate(indices) if i is not None]
    places = [i for i in indices if i is not None]
    if len(axes) == 1:
        axis, place = axes[0], places[0]
        return b.op("Gather", x, place, axis=axis, shape=(*x.dims[:axis], *place.dims, *x.dims[axis + 1 :]))
    rest = [a for a in range(x.rank) if a not in axes]
    where = together(b, places)
    depth = where.rank - 1
    dims = (*where.dims[:-1], *(x.dims[a] for a in rest))
    made = b.op("GatherND", b.transpose(x, [*axes, *rest]), where, shape=dims)
    if axes[-1] - axes[0] >= len(axes):
        return made
    before = axes[0]
    perm = [*range(depth, depth + before), *range(depth), *range(depth + before, len(dims))]
    return b.transpose(made, perm)


def together(b: Lowering, places: Sequence[Tensor]) -> Tensor:
    """Positions along several axes as one tensor, the last axis of which runs over those axes."""
    rank = max(p.rank for p in places)
    places = [with_axes(b, p, range(rank - p.rank)) for p in places]
    dims = _broadcast([p.dims for p in places])
    if any(p.dims != dims for p in places):
        total = places[0]
        for p in places[1:]:  # a sum has the shape that all broadcast to, dynamic or not
            total = b.op("Add", total, p, shape=_broadcast([total.dims, p.dims]))
        shape = shape_value(b, total) if None in dims else b.ints([d or 0 for d in dims])
        places = [p if p.dims == dims and None not in dims else b.op("Expand", p, shape, shape=dims) for p in places]
    return b.op("Concat", *(with_axes(b, p, [rank]) for p in places), axis=rank, shape=(*dims, len(places)))


def _broadcast(shapes: Sequence[Dims]) -> Dims:
    return tuple(next((d for d in sizes if d != 1), 1) for sizes in zip(*shapes, strict=True))


# ---------------------------------------------------------------- lookups
@computes("index_select")
def index_select(b: Lowering, input: Tensor, dim: int, index: Tensor) -> Tensor:
    index = index if index.rank else with_axes(b, index, [0])
    return b.op("Gather", input, index, axis=b.axis(input, dim), shape=b.shape)


@computes("gather")
def gather(b: Lowering, input: Tensor, dim: int, index: Tensor, sparse_grad: bool = False) -> Tensor:
    if not input.rank:
        raise UnsupportedPattern("an index into a single number")
    return b.op("GatherElements", input, index, axis=b.axis(input, dim), shape=b.shape)


@lowers("take_along_dim")
def take_along_dim(b: Lowering, input: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    """Both sides broadcast to each other, except along the axis."""
    if dim is None:
        flat = b.reshape(input, [-1])
        return b.op("GatherElements", flat, b.reshape(indices, [-1]), axis=0, shape=b.shape)
    axis = b.axis(input, dim)
    if input.rank != indices.rank or None in input.dims or None in indices.dims:
        raise UnsupportedPattern("broadcasting of dynamic sizes")
    dims = _broadcast([with_size(x.dims, axis, 1) for x in (input, indices)])
    sides = []
    for x in (input, indices):
        own = with_size(dims, axis, x.dims[axis])
        sides.append(x if x.dims == own else b.op("Expand", x, b.ints([d or 0 for d in own]), shape=own))
    return b.op("GatherElements", *sides, axis=axis, shape=b.shape)


@lowers("take")
def take(b: Lowering, input: Tensor, index: Tensor) -> Tensor:
    return b.op("Gather", b.reshape(input, [-1]), index, axis=0, shape=b.shape)


@computes("embedding", modules=(nn.Embedding,))
def embedding(
    b: Lowering, input: Tensor, weight: Tensor, padding_idx: Any = None, max_norm: Any = None, *rest: Any, **named: Any
) -> Tensor:
    """Rows of a table; ``padding_idx`` concerns training only. aten gives the table first."""
    if input.dtype.is_floating_point:
        return b.op("Gather", input, weight, axis=0, shape=b.shape)
    if max_norm is not None:
        raise UnsupportedPattern("an embedding that changes its table (max_norm)")
    return b.op("Gather", weight, input, axis=0, shape=b.shape)


_REDUCED = {"sum": "ReduceSum", "mean": "ReduceMean", "max": "ReduceMax"}


@computes("embedding_bag")
def embedding_bag(
    b: Lowering,
    input: Tensor,
    weight: Tensor,
    offsets: Any = None,
    max_norm: Any = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Bags of equal length: rows of a table, reduced."""
    if input.dtype.is_floating_point or input.rank != 2 or offsets is not None:
        raise UnsupportedPattern("bags of different lengths (offsets)")
    if max_norm is not None or padding_idx is not None:
        raise UnsupportedPattern("max_norm or padding_idx in bags")
    dims = (*input.dims, weight.dims[1])
    rows = b.op("Gather", weight, input, axis=0, shape=dims)
    if per_sample_weights is not None:
        rows = b.op("Mul", rows, with_axes(b, per_sample_weights, [2]), shape=dims)
    return b.op(_REDUCED[mode], rows, b.ints([1]), keepdims=0, shape=b.shape)


@lowers(modules=(nn.EmbeddingBag,), inputs=3)
def embedding_bag_module(
    b: Lowering,
    input: Tensor,
    offsets: Any = None,
    per_sample_weights: Tensor | None = None,
    *,
    weight: Tensor,
    max_norm: Any,
    mode: str,
    padding_idx: Any,
) -> Tensor:
    made: Tensor = embedding_bag(b, input, weight, offsets, max_norm, mode=mode, padding_idx=padding_idx,
                                 per_sample_weights=per_sample_weights)  # fmt: skip
    return made


@lowers("one_hot")
def one_hot(b: Lowering, input: Tensor, num_classes: Any = -1) -> Tensor:
    if known(num_classes) < 0:
        raise UnsupportedPattern("a number of classes that depends on data")
    depth = b.tensor(num_classes, torch.int64)
    return b.op("OneHot", input, depth, np.asarray([0, 1], np.int64), axis=-1, shape=b.shape)


# ---------------------------------------------------------------- by position
@lowers("tril")
def tril(b: Lowering, input: Tensor, diagonal: Any = 0) -> Tensor:
    return b.op("Trilu", input, b.tensor(diagonal, torch.int64), upper=0, shape=input.shape)


@lowers("triu")
def triu(b: Lowering, input: Tensor, diagonal: Any = 0) -> Tensor:
    return b.op("Trilu", input, b.tensor(diagonal, torch.int64), upper=1, shape=input.shape)
