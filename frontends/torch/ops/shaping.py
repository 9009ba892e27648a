"""Lowering of operations that move entries without computing: views, axes, joins, splits, repeats, rolls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.frontends.torch.table import lowers
from cipm_ir.frontends.torch.values import Dims, Lowering, Number, Tensor, known, static_shape

END = 2**63 - 1
"""Bound of a slice that goes to the end."""


def flat_sizes(sizes: Sequence[Any]) -> list[int | Number]:
    """Sizes that are given one by one or as one list."""
    if len(sizes) == 1 and isinstance(sizes[0], list | tuple):
        sizes = sizes[0]
    if any(not isinstance(n, Number) and type(n) is not int for n in sizes):
        raise UnsupportedPattern("sizes that are not numbers")
    return list(sizes)


def shape_value(b: Lowering, x: Tensor) -> Tensor:
    """The shape of a tensor, as the graph computes it."""
    return b.op("Shape", x, shape=(x.rank,), dtype=torch.int64)


def run_of(b: Lowering, x: Tensor, axis: int, start: Any, end: Any, step: int = 1, shape: Dims | None = None) -> Tensor:
    """Slice along one axis; bounds are ints or numbers computed from sizes."""
    last = None if step == 1 else np.asarray([step], np.int64)
    return b.op("Slice", x, b.ints([start]), b.ints([end]), np.asarray([axis], np.int64), last, shape=shape)


def with_size(dims: Dims, axis: int, size: int | None) -> Dims:
    """A shape with another size along one axis."""
    return (*dims[:axis], size, *dims[axis + 1 :])


# ---------------------------------------------------------------- views
def resized(
    b: Lowering, x: Tensor, sizes: Sequence[int | Number], copied: int = 0, tail: Tensor | None = None
) -> Tensor:
    """Reshape to the shape of the result: ``copied`` leading sizes of ``x``, then ``sizes``, then those in ``tail``.

    One of ``sizes`` may be -1.
    """
    if 0 in sizes and (copied or tail is not None):
        raise UnsupportedPattern("an axis without entries")
    target = b.ints([*[0] * copied, *sizes])
    if tail is not None:
        target = b.op("Concat", target, tail, axis=0, shape=(len(b.shape),))
    return b.op("Reshape", x, target, shape=b.shape, allowzero=1 if 0 in sizes else None)


def shape_from(b: Lowering, x: Tensor, first: int) -> Tensor | None:
    """Sizes of the axes from ``first`` on, as the graph computes them; None where there are none."""
    if first >= x.rank:
        return None
    return b.op("Shape", x, start=first or None, shape=(x.rank - first,), dtype=torch.int64)


@lowers("view", "reshape", "_unsafe_view", "view_copy", view=True)
def view(b: Lowering, input: Tensor, *sizes: Any, shape: Any = None, size: Any = None) -> Tensor:
    """Sizes that the program writes stay as written, -1 too; computed ones stay computed."""
    given = sizes or (shape if shape is not None else size,)
    if given[0] is None or isinstance(given[0], torch.dtype):
        raise UnsupportedPattern("a view as another type")
    return resized(b, input, flat_sizes(given))


@lowers("view_as", "reshape_as", view=True)
def view_as(b: Lowering, input: Tensor, other: Tensor) -> Tensor:
    return b.op("Reshape", input, shape_value(b, other), shape=b.shape)


@lowers("flatten", modules=(nn.Flatten,), view=True)
def flatten(b: Lowering, input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """No size is written down: they follow the input."""
    start, end = b.axis(input, start_dim), b.axis(input, end_dim)
    if start == end and input.rank:
        return input
    if end == input.rank - 1 and start == 1:
        return b.op("Flatten", input, axis=1, shape=b.shape)
    if start == 0 and end == input.rank - 2:
        return b.op("Flatten", input, axis=input.rank - 1, shape=b.shape)
    return resized(b, input, [-1], start, shape_from(b, input, end + 1))


@lowers("unflatten", view=True)
def unflatten(b: Lowering, input: Tensor, dim: int, sizes: Any) -> Tensor:
    if any(isinstance(n, str | tuple | list) for n in sizes):
        raise UnsupportedPattern("named axes")
    axis = b.axis(input, dim)
    return resized(b, input, flat_sizes(sizes), axis, shape_from(b, input, axis + 1))


@lowers(modules=(nn.Unflatten,))
def unflatten_module(b: Lowering, input: Tensor, dim: int, unflattened_size: Any) -> Tensor:
    made: Tensor = unflatten(b, input, dim, unflattened_size)
    return made


@lowers("ravel", view=True)
def ravel(b: Lowering, input: Tensor) -> Tensor:
    return resized(b, input, [-1])


@lowers("squeeze", "squeeze_copy", view=True)
def squeeze(b: Lowering, input: Tensor, dim: Any = None) -> Tensor:
    """Without axes, the axes of size one are those that the tensor has when it runs."""
    if dim is None:
        return b.op("Squeeze", input, shape=b.shape)
    dims = [dim] if isinstance(dim, int | Number) else dim
    axes = sorted({a for a in (b.axis(input, d) for d in dims) if input.rank and input.dims[a] == 1})
    return b.op("Squeeze", input, b.ints(axes), shape=b.shape) if axes else input


@lowers("unsqueeze", "unsqueeze_copy", view=True)
def unsqueeze(b: Lowering, input: Tensor, dim: int) -> Tensor:
    return with_axes(b, input, [b.axis(input.rank + 1, dim)])


def with_axes(b: Lowering, x: Tensor, axes: Sequence[int]) -> Tensor:
    """A tensor with new axes of size one; ``axes`` are places in the result."""
    if not axes:
        return x
    dims = list(x.dims)
    for a in sorted(axes):
        dims.insert(a, 1)
    return b.op("Unsqueeze", x, b.ints(sorted(axes)), shape=dims)


@lowers("atleast_1d", "atleast_2d", "atleast_3d", view=True)
def atleast(b: Lowering, *tensors: Any) -> Any:
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor):
        raise UnsupportedPattern("several tensors")
    return _atleast(b, tensors[0], len(b.shape))


def _atleast(b: Lowering, x: Tensor, rank: int) -> Tensor:
    """New axes as torch places them: in front, for a third one behind."""
    missing = {(0, 1): (0,), (0, 2): (0, 1), (0, 3): (0, 1, 2), (1, 2): (0,), (1, 3): (0, 2), (2, 3): (2,)}
    return with_axes(b, x, missing.get((x.rank, rank), ()))


# ---------------------------------------------------------------- order of axes
@lowers("permute", "permute_copy", view=True)
def permute(b: Lowering, input: Tensor, *dims: Any, **named: Any) -> Tensor:
    given = dims or tuple(named.values())
    return b.transpose(input, [b.axis(input, d) for d in flat_sizes(given)])


@lowers("transpose", "swapaxes", "swapdims", "transpose_copy", view=True)
def transpose(b: Lowering, input: Tensor, dim0: int, dim1: int) -> Tensor:
    perm = list(range(input.rank))
    if perm:
        p, q = b.axis(input, dim0), b.axis(input, dim1)
        perm[p], perm[q] = perm[q], perm[p]
    return b.transpose(input, perm)


@lowers("t", "t_copy", "mT", "adjoint", "mH", view=True)
def matrix_transpose(b: Lowering, input: Tensor) -> Tensor:
    if input.rank < 2:
        return input
    if input.dtype.is_complex:
        raise UnsupportedPattern("complex numbers")
    return b.transpose(input, [*range(input.rank - 2), input.rank - 1, input.rank - 2])


@lowers("numpy_T", view=True)
def reversed_axes(b: Lowering, input: Tensor) -> Tensor:
    return b.transpose(input, list(reversed(range(input.rank))))


@lowers("movedim", "moveaxis", view=True)
def movedim(b: Lowering, input: Tensor, source: Any, destination: Any) -> Tensor:
    places = dict(zip(_listed(b, input, destination), _listed(b, input, source), strict=True))
    rest = iter([a for a in range(input.rank) if a not in places.values()])
    return b.transpose(input, [places[a] if a in places else next(rest) for a in range(input.rank)])


def _listed(b: Lowering, x: Tensor, dims: Any) -> list[int]:
    return [b.axis(x, d) for d in (dims if isinstance(dims, list | tuple) else [dims])]


# ---------------------------------------------------------------- larger tensors of the same entries
@lowers("expand", "expand_copy", view=True)
def expand(b: Lowering, input: Tensor, *sizes: Any, size: Any = None, implicit: bool = False) -> Tensor:
    """-1 keeps a size, which broadcasting with 1 does as well."""
    if len(sizes) == 2 and isinstance(sizes[0], list | tuple):
        sizes = sizes[:1]
    target = [1 if type(n) is int and n == -1 else n for n in flat_sizes(sizes or (size,))]
    return b.op("Expand", input, b.ints(target), shape=b.shape)


@lowers("broadcast_to", view=True)
def broadcast_to(b: Lowering, input: Tensor, *size: Any, shape: Any = None) -> Tensor:
    made: Tensor = expand(b, input, *(size or (shape,)))
    return made


@lowers("expand_as", view=True)
def expand_as(b: Lowering, input: Tensor, other: Tensor) -> Tensor:
    return b.op("Expand", input, shape_value(b, other), shape=b.shape)


@lowers("repeat")
def repeat(b: Lowering, input: Tensor, *repeats: Any) -> Tensor:
    return _tiled(b, input, flat_sizes(repeats))


@lowers("tile")
def tile(b: Lowering, input: Tensor, *dims: Any) -> Tensor:
    times = flat_sizes(dims)
    return _tiled(b, input, [*[1] * (input.rank - len(times)), *times])


def _tiled(b: Lowering, x: Tensor, times: list[int | Number]) -> Tensor:
    x = with_axes(b, x, range(len(times) - x.rank))
    if all(n == 1 for n in times if not isinstance(n, Number)) and not any(isinstance(n, Number) for n in times):
        return b.op("Identity", x, shape=x.shape)
    return b.op("Tile", x, b.ints(times), shape=b.shape)


@lowers("repeat_interleave")
def repeat_interleave(
    b: Lowering, input: Tensor, repeats: Any, dim: int | None = None, output_size: Any = None
) -> Tensor:
    """Each entry along an axis several times in a row: a new axis, expanded and merged."""
    if isinstance(repeats, Tensor):
        raise UnsupportedPattern("a count for each entry")
    if dim is None:
        input, dim = b.reshape(input, [-1]), 0
    axis = b.axis(input, dim)
    column = with_axes(b, input, [axis + 1])
    sizes = [*[1] * (axis + 1), repeats, *[1] * (input.rank - axis - 1)]
    dims = with_size(column.dims, axis + 1, int(repeats.known()) if isinstance(repeats, Number) else repeats)
    column = b.op("Expand", column, b.ints(sizes), shape=dims)
    return resized(b, column, [-1], axis, shape_from(b, input, axis + 1))


@lowers("roll")
def roll(b: Lowering, input: Tensor, shifts: Any, dims: Any = None) -> Tensor:
    """x[-s:] before x[:-s], axis by axis; without axes, of the flat tensor."""
    steps = list(shifts) if isinstance(shifts, list | tuple) else [shifts]
    axes = [] if dims is None else _listed(b, input, dims)
    if not axes:
        if len(steps) != 1:
            raise UnsupportedPattern("several shifts of one axis")
        flat = _rolled(b, b.reshape(input, [-1]), 0, steps[0])
        return b.op("Reshape", flat, shape_value(b, input), shape=b.shape)
    x = input
    for axis, step in zip(axes, steps, strict=True):
        x = _rolled(b, x, axis, step)
    return b.op("Identity", x, shape=x.shape) if x is input else x


def _rolled(b: Lowering, x: Tensor, axis: int, step: int | Number) -> Tensor:
    size = x.dims[axis]
    if size is None:
        raise UnsupportedPattern("a roll along an axis of dynamic size")
    length = int(known(step)) % size if size else 0
    cut: Any = -length
    if isinstance(step, Number):
        if length != step.hint:
            raise UnsupportedPattern("a computed shift by more than the size")
        cut = Number(lambda: b.op("Neg", step, shape=(), dtype=torch.int64).value, -length)
    if length == 0:
        return x
    last = run_of(b, x, axis, cut, END, shape=with_size(x.dims, axis, length))
    first = run_of(b, x, axis, 0, cut, shape=with_size(x.dims, axis, size - length))
    return b.op("Concat", last, first, axis=axis, shape=x.shape)


@lowers("fliplr")
def fliplr(b: Lowering, input: Tensor) -> Tensor:
    return _flipped(b, input, [1])


@lowers("flipud")
def flipud(b: Lowering, input: Tensor) -> Tensor:
    return _flipped(b, input, [0])


@lowers("flip")
def flip(b: Lowering, input: Tensor, *dims: Any, **named: Any) -> Tensor:
    return _flipped(b, input, flat_sizes(dims or tuple(named.values())))


def _flipped(b: Lowering, x: Tensor, dims: Sequence[int | Number]) -> Tensor:
    for axis in [b.axis(x, d) for d in dims]:
        x = run_of(b, x, axis, -1, -END, -1, shape=x.dims)
    return x


# ---------------------------------------------------------------- joins
@lowers("cat", "concat", "concatenate")
def cat(b: Lowering, tensors: Any, dim: int = 0, axis: int | None = None) -> Tensor:
    """Empty one-dimensional tensors count for nothing, as torch has it."""
    parts = [b.tensor(x, b.dtype) for x in tensors]
    if len(b.shape) > 1:
        parts = [x for x in parts if x.shape != (0,)]
    if len(parts) == 1:
        return b.op("Identity", parts[0], shape=b.shape)
    return b.op("Concat", *parts, axis=b.axis(parts[0], dim if axis is None else axis), shape=b.shape)


@lowers("stack")
def stack(b: Lowering, tensors: Any, dim: int = 0) -> Tensor:
    place = b.axis(len(b.shape), dim)
    parts = [with_axes(b, b.tensor(x, b.dtype), [place]) for x in tensors]
    return b.op("Concat", *parts, axis=place, shape=b.shape) if len(parts) > 1 else parts[0]


def _stacked(rank: int, axis: int | None, *names: str) -> None:
    @lowers(*names)
    def entry(b: Lowering, tensors: Any) -> Tensor:
        parts = [_atleast(b, b.tensor(x, b.dtype), max(rank, x.rank)) for x in tensors]
        along = axis if axis is not None else min(parts[0].rank - 1, 1)
        made: Tensor = cat(b, parts, along)
        return made


_stacked(1, None, "hstack")
_stacked(2, 0, "vstack", "row_stack")
_stacked(3, 2, "dstack")


# ---------------------------------------------------------------- parts
def parts_of(b: Lowering, x: Tensor, axis: int, sizes: Sequence[int | Number] | None) -> tuple[Tensor, ...]:
    """Consecutive runs along an axis: of the given sizes, or as many equal ones as torch says."""
    shapes = [static_shape(o) for o in b.out]
    if len(shapes) == 1:
        return (x,)
    if sizes is None:
        return tuple(b.multi("Split", [x], shapes, axis=axis, num_outputs=len(shapes)))
    return tuple(b.multi("Split", [x, b.ints(sizes)], shapes, axis=axis))


def _part_sizes(b: Lowering, x: Tensor, axis: int) -> list[int]:
    sizes = [static_shape(o)[axis] for o in b.out]
    found = [n for n in sizes if n is not None]
    if len(found) < len(sizes) or sum(found) != x.dims[axis]:
        raise UnsupportedPattern("parts of dynamic sizes, or parts that overlap")
    return found


@lowers("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", view=True)
def split(
    b: Lowering,
    tensor: Tensor,
    split_size_or_sections: Any = None,
    dim: int = 0,
    split_size: Any = None,
    split_sizes: Any = None,
) -> tuple[Tensor, ...]:
    axis = b.axis(tensor, dim)
    given = next(g for g in (split_size_or_sections, split_size, split_sizes) if g is not None)
    if isinstance(given, list | tuple):
        return parts_of(b, tensor, axis, flat_sizes(given))
    if isinstance(given, Number):
        sizes = _part_sizes(b, tensor, axis)
        if len(set(sizes)) > 1:
            raise UnsupportedPattern("parts of a computed size that leave a remainder")
        return parts_of(b, tensor, axis, [given] * len(sizes))
    return parts_of(b, tensor, axis, _part_sizes(b, tensor, axis))


@lowers("chunk", "unsafe_chunk", view=True)
def chunk(b: Lowering, input: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    """As many parts as asked for follow the size of the input; where torch makes fewer, their sizes are fixed."""
    axis = b.axis(input, dim)
    return parts_of(b, input, axis, None if len(b.out) == known(chunks) else _part_sizes(b, input, axis))


@lowers("tensor_split", view=True)
def tensor_split(
    b: Lowering, input: Tensor, indices_or_sections: Any = None, dim: int = 0, sections: Any = None, indices: Any = None
) -> tuple[Tensor, ...]:
    given = next(g for g in (indices_or_sections, sections, indices) if g is not None)
    if isinstance(given, Tensor):
        raise UnsupportedPattern("places that are computed")
    axis = b.axis(input, dim)
    sizes = _part_sizes(b, input, axis)
    return parts_of(b, input, axis, None if isinstance(given, int) and len(set(sizes)) == 1 else sizes)


@lowers("unbind", view=True)
def unbind(b: Lowering, input: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    axis, shapes = b.axis(input, dim), [static_shape(o) for o in b.out]
    thin = [(*s[:axis], 1, *s[axis:]) for s in shapes]
    parts = [input] if len(shapes) == 1 else b.multi("Split", [input], thin, axis=axis, num_outputs=len(shapes))
    return tuple(b.op("Squeeze", x, b.ints([axis]), shape=s) for x, s in zip(parts, shapes, strict=True))
