"""Lowering of reductions: sums, extrema, norms, variances, softmax, sorting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.frontends.torch.table import computes
from cipm_ir.frontends.torch.values import Dims, Lowering, Number, Tensor, known


class Extrema(NamedTuple):
    """Values with their positions, by torch's names."""

    values: Tensor
    indices: Tensor


class Bounds(NamedTuple):
    """Both extrema, by torch's names."""

    min: Tensor
    max: Tensor


def axes_input(b: Lowering, axes: Sequence[int]) -> Tensor:
    """Axes as an input of a node."""
    return b.const(np.asarray(axes, np.int64))


def reduced_shape(x: Tensor, axes: Sequence[int], keepdim: bool) -> Dims:
    """Sizes after a reduction."""
    if keepdim:
        return tuple(1 if a in axes else d for a, d in enumerate(x.dims))
    return tuple(d for a, d in enumerate(x.dims) if a not in axes)


def reduced(b: Lowering, op_type: str, x: Tensor, axes: Sequence[int], keepdim: bool) -> Tensor:
    """Reduce over some axes; nothing to do over none."""
    if not axes and op_type in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd"):
        return x
    given = None if len(axes) == x.rank else axes_input(b, axes)
    return b.op(op_type, x, given, keepdims=int(bool(keepdim)), shape=reduced_shape(x, axes, keepdim))


def _options(dim: Any, keepdim: Any, names: dict[str, Any]) -> tuple[Any, bool]:
    """`dim` and `keepdim`, also under numpy's names."""
    _check_out(names)
    return names.get("axis", dim), bool(names.get("keepdims", keepdim))


def _check_out(names: dict[str, Any]) -> None:
    if names.get("out") is not None:
        raise UnsupportedPattern("it writes to a tensor that is given (out=)")


def _reduction(op_type: str, *names: str) -> None:
    @computes(*names)
    def entry(b: Lowering, input: Tensor, dim: Any = None, keepdim: Any = False, **other: Any) -> Tensor:
        if isinstance(dim, torch.dtype):
            dim = None
        dim, keepdim = _options(dim, keepdim, other)
        x = b.cast(input, b.dtype)
        if x.dtype == torch.bool:
            raise UnsupportedPattern("a reduction of truth values")
        return reduced(b, op_type, x, b.axes(x, dim), keepdim)


for _op, _name in (
    ("ReduceMean", "mean"),
    ("ReduceSum", "sum"),
    ("ReduceProd", "prod"),
    ("ReduceMax", "amax"),
    ("ReduceMin", "amin"),
    ("ReduceLogSumExp", "logsumexp"),
):
    _reduction(_op, _name)


# ---------------------------------------------------------------- extrema and order
def _position(b: Lowering, op_type: str, x: Tensor, dim: Any, keepdim: Any) -> Tensor:
    """The first position of an extremum, in the whole tensor or along an axis."""
    if dim is None:
        flat = b.op("Reshape", x, np.asarray([-1], np.int64), shape=(_count(x),))
        made = b.op(op_type, flat, axis=0, keepdims=0, dtype=torch.int64, shape=())
        if keepdim and x.rank:
            made = b.op("Reshape", made, np.ones(x.rank, np.int64), shape=(1,) * x.rank)
        return made
    axis = b.axis(x, dim)
    if not x.rank:
        raise UnsupportedPattern("a position in a single number")
    shape = reduced_shape(x, [axis], keepdim)
    return b.op(op_type, x, axis=axis, keepdims=int(bool(keepdim)), dtype=torch.int64, shape=shape)


def _count(x: Tensor) -> int | None:
    return None if None in x.dims else math.prod(d or 0 for d in x.dims)


def _extremum(kind: str) -> None:
    @computes(kind.lower())
    def entry(b: Lowering, input: Tensor, dim: Any = None, keepdim: Any = False, **other: Any) -> Any:
        """Three forms: of all entries, along an axis with positions, of two tensors."""
        _check_out(other)
        second = other.get("other", dim)
        if isinstance(second, Tensor):
            return b.op(kind, b.cast(input, b.dtype), b.cast(second, b.dtype), shape=b.shape)
        dim, keepdim = _options(dim, keepdim, other)
        if input.dtype == torch.bool:
            raise UnsupportedPattern("a reduction of truth values")
        if dim is None:
            return reduced(b, f"Reduce{kind}", input, list(range(input.rank)), False)
        values = reduced(b, f"Reduce{kind}", input, [b.axis(input, dim)], keepdim)
        return Extrema(values, _position(b, f"Arg{kind}", input, dim, keepdim))

    @computes(f"arg{kind.lower()}")
    def position(b: Lowering, input: Tensor, dim: Any = None, keepdim: Any = False, **other: Any) -> Tensor:
        dim, keepdim = _options(dim, keepdim, other)
        return _position(b, f"Arg{kind}", input, dim, keepdim)


_extremum("Max")
_extremum("Min")


@computes("aminmax")
def aminmax(b: Lowering, input: Tensor, dim: Any = None, keepdim: Any = False) -> Any:
    over = b.axes(input, dim)
    return Bounds(reduced(b, "ReduceMin", input, over, keepdim), reduced(b, "ReduceMax", input, over, keepdim))


@computes("topk")
def topk(b: Lowering, input: Tensor, k: Any, dim: Any = -1, largest: Any = True, sorted: Any = True) -> Extrema:
    if not sorted:
        raise UnsupportedPattern("the largest entries in no order")
    return _ordered(b, input, k, b.axis(input, dim), bool(largest))


def _ordered(b: Lowering, x: Tensor, count: Any, axis: int, descending: bool) -> Extrema:
    if not x.rank or x.dtype == torch.bool:
        raise UnsupportedPattern("sorting of a single number or of truth values")
    size = count.hint if isinstance(count, Number) else count
    length = None if size is None else int(size)
    shape = [length if a == axis else d for a, d in enumerate(x.dims)]
    values, indices = b.multi(
        "TopK", [x, b.ints([count])], [shape, shape], axis=axis, largest=int(descending), sorted=1
    )
    indices.dtype, indices.value.dtype = torch.int64, ir.DataType.INT64
    return Extrema(values, indices)


@computes("sort")
def sort(b: Lowering, input: Tensor, dim: Any = -1, descending: Any = False, *, stable: Any = False) -> Extrema:
    """All entries in order; equal ones in the order in which they stand."""
    axis = b.axis(input, dim)
    return _ordered(b, input, b.size(input, axis), axis, bool(descending))


@computes("argsort")
def argsort(b: Lowering, input: Tensor, dim: Any = -1, descending: Any = False, *, stable: Any = False) -> Tensor:
    return sort(b, input, dim, descending).indices


@computes("msort")
def msort(b: Lowering, input: Tensor) -> Tensor:
    return sort(b, input, 0).values


@computes("cumsum")
def cumsum(b: Lowering, input: Tensor, dim: Any = None, **other: Any) -> Tensor:
    x = b.cast(input, b.dtype)
    axis = b.axis(x, _options(dim, None, other)[0])
    return b.op("CumSum", x, np.asarray(axis, np.int64), shape=x.shape) if x.rank else x


# ---------------------------------------------------------------- truth values, counts
def _truth(name: str, op_type: str) -> None:
    @computes(name)
    def entry(b: Lowering, input: Tensor, dim: Any = None, keepdim: Any = False, **other: Any) -> Tensor:
        dim, keepdim = _options(dim, keepdim, other)
        numbers = b.cast(b.cast(input, torch.bool), torch.int32)
        return b.cast(reduced(b, op_type, numbers, b.axes(input, dim), keepdim), b.dtype)


_truth("all", "ReduceMin")
_truth("any", "ReduceMax")


@computes("count_nonzero")
def count_nonzero(b: Lowering, input: Tensor, dim: Any = None) -> Tensor:
    ones = b.cast(b.cast(input, torch.bool), torch.int64)
    return reduced(b, "ReduceSum", ones, b.axes(input, dim), False)


# ---------------------------------------------------------------- variance
def _moments(b: Lowering, x: Tensor, dim: Any, keepdim: bool, correction: Any) -> tuple[Tensor, Tensor]:
    """Variance and mean; the count follows the tensor."""
    over = b.axes(x, dim)
    mean = reduced(b, "ReduceMean", x, over, True)
    centred = b.op("Sub", x, mean, shape=x.shape)
    square = b.op("Mul", centred, centred, shape=x.shape)
    if not correction:
        return reduced(b, "ReduceMean", square, over, keepdim), reduced(b, "ReduceMean", x, over, keepdim)
    whole = b.op("Shape", x, dtype=torch.int64, shape=(x.rank,))
    sizes = b.op("Gather", whole, np.asarray(over, np.int64), axis=0, shape=(len(over),))
    count = b.cast(b.op("ReduceProd", sizes, keepdims=0, shape=()), x.dtype)
    rest = b.op("Max", b.op("Sub", count, float(correction), shape=()), 0.0, shape=())
    total = reduced(b, "ReduceSum", square, over, keepdim)
    return b.op("Div", total, rest, shape=total.shape), reduced(b, "ReduceMean", x, over, keepdim)


def _spread(b: Lowering, input: Tensor, args: tuple[Any, ...], names: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Arguments of var, std and similar functions: (unbiased), or (dim, unbiased, keepdim), or by name."""
    _check_out(names)
    dim, unbiased, keepdim = names.get("dim", names.get("axis")), names.get("unbiased", True), False
    if len(args) == 1 and isinstance(args[0], bool):
        unbiased = args[0]
    elif args:
        dim = args[0]
        unbiased = args[1] if len(args) > 1 else unbiased
        keepdim = args[2] if len(args) > 2 else keepdim
    keepdim = names.get("keepdim", names.get("keepdims", keepdim))
    correction = names.get("correction")
    if correction is None:
        correction = 1 if unbiased or unbiased is None else 0
    return _moments(b, b.tensor(input), dim, bool(keepdim), known(correction))


def _root(b: Lowering, x: Tensor) -> Tensor:
    return b.op("Sqrt", x, shape=x.shape)


@computes("var")
def var(b: Lowering, input: Tensor, *args: Any, **names: Any) -> Tensor:
    return _spread(b, input, args, names)[0]


@computes("std")
def std(b: Lowering, input: Tensor, *args: Any, **names: Any) -> Tensor:
    return _root(b, _spread(b, input, args, names)[0])


@computes("var_mean")
def var_mean(b: Lowering, input: Tensor, *args: Any, **names: Any) -> Any:
    return _spread(b, input, args, names)


@computes("std_mean")
def std_mean(b: Lowering, input: Tensor, *args: Any, **names: Any) -> Any:
    spread, mean = _spread(b, input, args, names)
    return _root(b, spread), mean


# ---------------------------------------------------------------- norms
def norm_over(b: Lowering, x: Tensor, p: Any, axes: Sequence[int], keepdim: bool) -> Tensor:
    """The p-norm of the entries along some axes."""
    p = known(p)
    if not x.dtype.is_floating_point or not axes:
        raise UnsupportedPattern("a norm of integers, or over no axis")
    if p in ("fro", None, 2):
        return reduced(b, "ReduceL2", x, axes, keepdim)
    if isinstance(p, str):
        raise UnsupportedPattern(f"the norm {p!r}")
    if p == 1:
        return reduced(b, "ReduceL1", x, axes, keepdim)
    if p == 0:
        ones = b.cast(b.cast(x, torch.bool), x.dtype)
        return reduced(b, "ReduceSum", ones, axes, keepdim)
    size = b.op("Abs", x, shape=x.shape)
    if math.isinf(p):
        return reduced(b, "ReduceMax" if p > 0 else "ReduceMin", size, axes, keepdim)
    total = reduced(b, "ReduceSum", b.op("Pow", size, float(p), shape=x.shape), axes, keepdim)
    return b.op("Pow", total, 1 / float(p), shape=total.shape)


@computes("norm")
def norm(b: Lowering, input: Tensor, p: Any = "fro", dim: Any = None, keepdim: Any = False, **other: Any) -> Tensor:
    _check_out(other)
    x = b.cast(input, b.dtype)
    return norm_over(b, x, p, b.axes(x, dim), bool(keepdim))


@computes("linalg_vector_norm", "vector_norm")
def vector_norm(
    b: Lowering, input: Tensor, ord: Any = 2, dim: Any = None, keepdim: Any = False, *, dtype: Any = None
) -> Tensor:
    x = b.cast(input, b.dtype)
    return norm_over(b, x, ord, b.axes(x, dim), bool(keepdim))


@computes("linalg_norm")
def linalg_norm(
    b: Lowering, input: Tensor, ord: Any = None, dim: Any = None, keepdim: Any = False, *, dtype: Any = None
) -> Tensor:
    x = b.cast(input, b.dtype)
    over = b.axes(x, dim)
    if ord not in (None, "fro") and len(over) > 1:
        raise UnsupportedPattern("a norm of matrices")
    return norm_over(b, x, ord, over, bool(keepdim))


@computes("linalg_matrix_norm", "matrix_norm")
def matrix_norm(
    b: Lowering, input: Tensor, ord: Any = "fro", dim: Any = (-2, -1), keepdim: Any = False, *, dtype: Any = None
) -> Tensor:
    if ord != "fro":
        raise UnsupportedPattern("a norm of matrices")
    return linalg_norm(b, input, "fro", dim, keepdim)


# ---------------------------------------------------------------- softmax
def _implicit_axis(x: Tensor) -> int:
    """What torch takes (and warns) where the program names no axis."""
    return 0 if x.rank in (0, 1, 3) else 1


def _soft(b: Lowering, op_type: str, input: Tensor, dim: Any, names: dict[str, Any] | None = None) -> Tensor:
    _check_out(names or {})
    x = b.cast(input, b.dtype)
    if not x.rank:
        raise UnsupportedPattern("softmax of a single number")
    axis = b.axis(x, _implicit_axis(x) if dim is None else dim)
    return b.op(op_type, x, axis=axis, shape=x.shape)


@computes("softmax", "_softmax", "_safe_softmax", modules=(nn.Softmax,))
def softmax(b: Lowering, input: Tensor, dim: Any = None, *rest: Any, **other: Any) -> Tensor:
    return _soft(b, "Softmax", input, dim, other)


@computes("log_softmax", "_log_softmax", modules=(nn.LogSoftmax,))
def log_softmax(b: Lowering, input: Tensor, dim: Any = None, *rest: Any, **other: Any) -> Tensor:
    return _soft(b, "LogSoftmax", input, dim, other)


@computes("softmin", modules=(nn.Softmin,))
def softmin(b: Lowering, input: Tensor, dim: Any = None, *rest: Any, **other: Any) -> Tensor:
    return _soft(b, "Softmax", b.op("Neg", b.cast(input, b.dtype), shape=input.shape), dim, other)


@computes(modules=(nn.Softmax2d,))
def softmax_channels(b: Lowering, input: Tensor) -> Tensor:
    return _soft(b, "Softmax", input, -3)
