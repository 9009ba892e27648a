"""Lowering of writes into a tensor: the value after the write is a new tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.frontends.torch.ops.indexing import picked_positions, together
from cipm_ir.frontends.torch.ops.shaping import run_of, shape_value, with_axes, with_size
from cipm_ir.frontends.torch.table import lowers
from cipm_ir.frontends.torch.values import Dims, Lowering, Number, Operand, Tensor

_REDUCTIONS = {"add": "add", "sum": "add", "multiply": "mul", "prod": "mul", "amax": "max", "amin": "min"}


def broadcast(b: Lowering, x: Tensor, dims: Dims, like: Tensor) -> Tensor:
    """A tensor expanded to the shape of another."""
    if x.rank > len(dims):
        raise UnsupportedPattern("a value with more axes than where it goes")
    if x.shape == dims and None not in dims:
        return x
    return b.op("Expand", x, shape_value(b, like), shape=dims)


# ---------------------------------------------------------------- along one axis, entry by entry
def scattered(b: Lowering, x: Tensor, dim: int, index: Tensor, src: Operand, reduction: str | None = None) -> Tensor:
    """Entries of ``src`` at positions along an axis; of a larger ``src`` its leading part, as torch has it."""
    if not x.rank:
        raise UnsupportedPattern("a write into a single number")
    source = b.tensor(src, x.dtype)
    if not source.rank:
        source = b.op("Expand", source, shape_value(b, index), shape=index.dims)
    elif source.dims != index.dims:
        if None in index.dims:
            raise UnsupportedPattern("a write of dynamic size")
        for axis, (size, whole) in enumerate(zip(index.dims, source.dims, strict=True)):
            if size != whole:
                source = run_of(b, source, axis, 0, size or 0, shape=with_size(source.dims, axis, size))
    return b.op("ScatterElements", x, index, source, axis=b.axis(x, dim), reduction=reduction, shape=x.shape)


@lowers("scatter")
def scatter(
    b: Lowering, input: Tensor, dim: int, index: Tensor, src: Operand = None, value: Operand = None, reduce: Any = None
) -> Tensor:
    kind = None if reduce is None else _REDUCTIONS[reduce]
    return scattered(b, input, dim, index, value if src is None else src, kind)


@lowers("scatter_add")
def scatter_add(b: Lowering, input: Tensor, dim: int, index: Tensor, src: Operand) -> Tensor:
    return scattered(b, input, dim, index, src, "add")


@lowers("scatter_reduce")
def scatter_reduce(
    b: Lowering, input: Tensor, dim: int, index: Tensor, src: Operand, reduce: str, include_self: bool = True
) -> Tensor:
    if not include_self or reduce not in _REDUCTIONS:
        raise UnsupportedPattern("a mean of scattered entries, or one without the entries that are there")
    return scattered(b, input, dim, index, src, _REDUCTIONS[reduce])


# ---------------------------------------------------------------- along one axis, in whole rows
def _rows(b: Lowering, x: Tensor, dim: int, index: Tensor, src: Tensor, reduction: str | None) -> Tensor:
    axis = b.axis(x, dim)
    column = b.reshape(b.cast(index, torch.int64), [-1, *[1] * (x.rank - axis - 1)])
    places = b.op("Expand", column, shape_value(b, src), shape=src.dims)
    return scattered(b, x, axis, places, src, reduction)


@lowers("index_add")
def index_add(b: Lowering, input: Tensor, dim: int, index: Tensor, source: Tensor, alpha: Any = 1) -> Tensor:
    if alpha != 1:
        source = b.op("Mul", source, alpha, shape=source.shape)
    return _rows(b, input, dim, index, source, "add")


@lowers("index_copy")
def index_copy(b: Lowering, input: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    return _rows(b, input, dim, index, source, None)


@lowers("index_fill")
def index_fill(b: Lowering, input: Tensor, dim: int, index: Tensor, value: Operand) -> Tensor:
    axis = b.axis(input, dim)
    index = index if index.rank else with_axes(b, index, [0])
    rows = b.op("Gather", input, index, axis=axis, shape=with_size(input.dims, axis, index.dims[0]))
    filled = b.op("Expand", b.tensor(value, input.dtype), shape_value(b, rows), shape=rows.shape)
    return _rows(b, input, axis, index, filled, None)


# ---------------------------------------------------------------- runs
def assigned(b: Lowering, x: Tensor, items: Sequence[Any], value: Operand) -> Tensor:
    """x after ``x[items] = value``, where items are numbers and slices of step one: pieces joined again."""
    given = b.tensor(value, x.dtype)
    kept = [a for a, i in enumerate(items) if type(i) is int]
    if given.rank > x.rank - len(kept):
        raise UnsupportedPattern("a value with more axes than where it goes")
    missing = [a for a in kept if x.rank - a <= given.rank + sum(1 for c in kept if c > a)]
    given = with_axes(b, given, [a - (x.rank - given.rank - len(missing)) for a in missing])
    return _assigned(b, x, list(items), 0, given)


def _assigned(b: Lowering, x: Tensor, items: list[Any], axis: int, value: Tensor) -> Tensor:
    if axis == len(items):
        return broadcast(b, value, x.dims, x)
    start, end, size = _cut(items[axis], x.dims[axis])
    if start == 0 and end == size:
        return _assigned(b, x, items, axis + 1, value)
    assert size is not None
    if end <= start:
        return x
    part = run_of(b, x, axis, start, end, shape=with_size(x.dims, axis, end - start))
    pieces = [_assigned(b, part, items, axis + 1, value)]
    if start > 0:
        pieces.insert(0, run_of(b, x, axis, 0, start, shape=with_size(x.dims, axis, start)))
    if end < size:
        pieces.append(run_of(b, x, axis, end, size, shape=with_size(x.dims, axis, size - end)))
    return b.op("Concat", *pieces, axis=axis, shape=x.shape)


def _cut(item: Any, size: int | None) -> tuple[int, Any, int | None]:
    """First position and the one after the last; a whole axis may have a dynamic size."""
    if item == slice(None):
        return 0, size, size
    if size is None:
        raise UnsupportedPattern("a write into part of an axis of dynamic size")
    if type(item) is int:
        return item % size, item % size + 1, size
    if any(isinstance(x, Number | Tensor) for x in (item.start, item.stop, item.step)):
        raise UnsupportedPattern("a write into a part with computed bounds")
    start, end, step = item.indices(size)
    if step != 1:
        raise UnsupportedPattern("a write into every other entry")
    return start, end, size


@lowers("slice_scatter")
def slice_scatter(
    b: Lowering, input: Tensor, src: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> Tensor:
    return assigned(b, input, [slice(None)] * b.axis(input, dim) + [slice(start, end, step)], src)


@lowers("select_scatter")
def select_scatter(b: Lowering, input: Tensor, src: Tensor, dim: int, index: Any) -> Tensor:
    if type(index) is not int:
        raise UnsupportedPattern("a write at a computed place")
    return assigned(b, input, [slice(None)] * b.axis(input, dim) + [index], src)


# ---------------------------------------------------------------- x[...] = value
@lowers("setitem")
def setitem(b: Lowering, input: Tensor, index: Any, value: Operand) -> Tensor:
    """The tensor after the write."""
    items = list(index) if isinstance(index, tuple) else [index]
    if None in [i for i in items if not isinstance(i, Tensor)]:
        raise UnsupportedPattern("a write through a new axis")
    at = next((k for k, i in enumerate(items) if i is Ellipsis), len(items))
    fill = [slice(None)] * (input.rank - sum(1 for i in items if i is not Ellipsis))
    items[at : at + 1] = fill
    if all(isinstance(i, slice) or type(i) is int for i in items):
        return assigned(b, input, items, value)
    if any(not isinstance(i, Tensor) and i != slice(None) for i in items):
        raise UnsupportedPattern("a write at positions and slices together")
    made: Tensor = index_put(b, input, [i if isinstance(i, Tensor) else None for i in items], value)
    return made


@lowers("index_put", "_unsafe_index_put", "_index_put_impl")
def index_put(
    b: Lowering, input: Tensor, indices: Sequence[Any], values: Operand, accumulate: bool = False, unsafe: bool = False
) -> Tensor:
    """Values at positions that are given for the leading axes, or one value where a mask holds."""
    places = [i for i in indices if i is not None]
    while indices[-1] is None:
        indices = indices[:-1]
    if len(places) == 1 and places[0].dtype in (torch.bool, torch.uint8):
        return _masked(b, input, list(indices), values, accumulate)
    if len(places) == 1 and places[0].rank == 1 and indices[0] is None:
        return _along(b, input, len(indices) - 1, picked_positions(b, indices[-1]), values, accumulate)
    if any(i is None for i in indices[: len(places)]):
        raise UnsupportedPattern("a write at positions along an inner axis")
    where = together(b, [picked_positions(b, i) for i in places])
    dims = (*where.dims[:-1], *input.dims[len(places) :])
    taken = b.op("GatherND", input, where, shape=dims)
    updates = broadcast(b, b.tensor(values, input.dtype), dims, taken)
    return b.op("ScatterND", input, where, updates, reduction="add" if accumulate else None, shape=input.shape)


def _along(b: Lowering, x: Tensor, axis: int, index: Tensor, values: Operand, accumulate: bool) -> Tensor:
    rows = b.op("Gather", x, index, axis=axis, shape=with_size(x.dims, axis, index.dims[0]))
    updates = broadcast(b, b.tensor(values, x.dtype), rows.dims, rows)
    return _rows(b, x, axis, index, updates, "add" if accumulate else None)


def _masked(b: Lowering, x: Tensor, indices: list[Any], values: Operand, accumulate: bool) -> Tensor:
    mask, value = next(i for i in indices if i is not None), b.tensor(values, x.dtype)
    if accumulate or int(np.prod([d or 2 for d in value.dims])) != 1:
        raise UnsupportedPattern("different values where a mask holds")
    before = next(k for k, i in enumerate(indices) if i is not None)
    mask = with_axes(b, b.cast(mask, torch.bool), [mask.rank + k for k in range(x.rank - before - mask.rank)])
    value = b.reshape(value, []) if value.rank else value
    return b.op("Where", mask, value, x, shape=x.shape, dtype=x.dtype)
