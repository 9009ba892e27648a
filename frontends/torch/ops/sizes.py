"""Sizes and other Python values that a torch graph computes beside its tensors."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.frontends.torch.ops.arithmetic import numbers
from cipm_ir.frontends.torch.ops.fourier import part
from cipm_ir.frontends.torch.table import lowers
from cipm_ir.frontends.torch.values import Lowering, Number, Tensor, known


def shape_of(b: Lowering, x: Tensor) -> tuple[Number, ...]:
    """All sizes of a tensor."""
    return tuple(b.size(x, axis) for axis in range(x.rank))


@lowers("size")
def size(b: Lowering, input: Tensor, dim: Any = None) -> Any:
    return shape_of(b, input) if dim is None else b.size(input, dim)


@lowers("sym_size")
def sym_size(b: Lowering, input: Tensor, dim: int) -> Number:
    return b.size(input, dim)


@lowers("getattr")
def attribute(b: Lowering, input: Any, name: str) -> Any:
    if isinstance(input, Tensor):
        if name == "shape":
            return shape_of(b, input)
        if name in ("dtype", "device", "ndim", "is_cuda", "requires_grad", "layout", "is_nested"):
            return b.out
        if name in ("T", "mT") and input.rank >= 2:
            perm = [*range(input.rank - 2), input.rank - 1, input.rank - 2]
            return b.transpose(input, perm if name == "mT" else list(reversed(range(input.rank))))
        if name in ("real", "imag") and (input.dtype.is_complex or name == "real"):
            return part(b, input)
        if name == "data":
            return b.op("Identity", input, shape=input.shape)
    elif isinstance(b.out, bool | int | float | str | torch.dtype | torch.device | type(None)):
        return b.out
    raise UnsupportedPattern(f"attribute {name!r}")


@lowers("numel", "sym_numel", "nelement")
def numel(b: Lowering, input: Tensor) -> Number:
    """Number of entries, computed: it must follow a size that changes."""
    hint = None if None in input.dims else math.prod(d for d in input.dims if d is not None)
    return Number(lambda: b.op("Size", input, shape=(), dtype=torch.int64).value, hint)


@lowers("dim", "ndimension", "get_device", "is_floating_point", "is_complex", "element_size", "len",
        "device", "sym_stride", "stride", "storage_offset", "is_contiguous")  # fmt: skip
def described(b: Lowering, input: Any, *args: Any) -> Any:
    """Facts of a tensor that tracing has answered."""
    if isinstance(b.out, torch.SymInt):
        raise UnsupportedPattern("a dynamic stride")
    return b.out


@lowers("sym_float")
def sym_float(b: Lowering, x: Any) -> Any:
    return _converted(b, x, torch.float32, float)


@lowers("sym_int")
def sym_int(b: Lowering, x: Any) -> Any:
    return _converted(b, x, torch.int64, int)


def _converted(b: Lowering, x: Any, dtype: torch.dtype, kind: Any) -> Any:
    if not isinstance(x, Number):
        return kind(x)
    return Number(lambda: b.cast(b.tensor(x), dtype).value, None if x.hint is None else kind(x.hint), dtype)


@lowers("sym_max")
def sym_max(b: Lowering, a: Any, c: Any) -> Any:
    return numbers(b, "Max", a, c)


@lowers("sym_min")
def sym_min(b: Lowering, a: Any, c: Any) -> Any:
    return numbers(b, "Min", a, c)


@lowers("_sym_sqrt")
def sym_sqrt(b: Lowering, x: Any) -> Any:
    if not isinstance(x, Number):
        return math.sqrt(x)
    hint = None if x.hint is None else math.sqrt(x.hint)
    return Number(lambda: b.op("Sqrt", b.cast(b.tensor(x), torch.float32), shape=()).value, hint, torch.float32)


@lowers("getitem")
def getitem(b: Lowering, input: Any, index: Any) -> Any:
    """A part of a structure, or an index into a tensor."""
    if isinstance(input, Tensor):
        from cipm_ir.frontends.torch.ops.indexing import indexed

        return indexed(b, input, index)
    if isinstance(index, slice):
        index = slice(known(index.start), known(index.stop), known(index.step))
    return operator.getitem(input, known(index))


@lowers("_assert", "_assert_scalar", "_assert_async", "_assert_is_none", "_assert_tensor_metadata",
        "sym_constrain_range_for_size", "sym_constrain_range", "_guards_fn", "_set_grad_enabled")  # fmt: skip
def ignored(b: Lowering, *args: Any, **kwargs: Any) -> None:
    """Checks that the program makes of its inputs compute nothing."""
    return None


@lowers("item")
def item(b: Lowering, input: Tensor) -> Any:
    raise UnsupportedPattern("a Python number that depends on data")


@lowers("is_", "is_not", "not_", "contains", "index", "isinstance")
def python(b: Lowering, *args: Any) -> Any:
    """Questions about Python values, which tracing has answered."""
    if any(isinstance(a, Tensor) and not isinstance(b.out, bool) for a in args):
        raise UnsupportedPattern("a Python operation on a tensor")
    return b.out


@lowers("sym_not")
def sym_not(b: Lowering, x: Any) -> Any:
    return b.out
