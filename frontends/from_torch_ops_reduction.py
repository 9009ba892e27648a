"""Lowering of reductions: sums, extrema, norms, variances, softmax, sorting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from cipm_ir.frontends.from_torch_table import lowers
from cipm_ir.frontends.from_torch_values import Dims, Lowering, Number, Refused, Tensor, known


class Extrema(NamedTuple):
    """Values with their positions, by torch's names."""

    values: Tensor
    indices: Tensor


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
    return names.get("axis", dim), bool(names.get("keepdims", keepdim))


def _alternative(b: Lowering, op_type: str, *names: str) -> None:
    @lowers(*names)
    def entry(b: Lowering, input: Tensor, dim: Any = None, keepdim: Any = False, **other: Any) -> Tensor:
        dim, keepdim = _options(dim, keepdim, other)
        x = b.cast(input, b.dtype)
        return reduced(b, op_type, x, b.axes(x, dim), keepdim)
