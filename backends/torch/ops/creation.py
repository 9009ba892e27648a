"""Operators that make tensors out of sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from cipm_ir.backends.torch.emitter import Emitter, emits, refuse
from cipm_ir.backends.torch.ops.elementwise import first, ratio
from cipm_ir.backends.torch.tensors import torch_dtype
from cipm_ir.ir.constants import attribute

__all__: list[str] = []


@emits("ConstantOfShape")
def _constant_of_shape(e: Emitter, node: ir.Node) -> fx.Node:
    sizes = e.ints(node.inputs[0])
    if sizes is None:
        raise refuse(node, "its shape is computed from data; make it a constant or derive it from shapes")
    value = attribute(node, "value")
    kind = ir.DataType.FLOAT if value is None else value.dtype
    number = 0.0 if value is None else _number(np.asarray(value.numpy()))
    return e.call(torch.full, sizes, number, dtype=torch_dtype(kind), **e.device())


def _number(array: np.ndarray) -> Any:
    wide = array if array.dtype.kind in "iub" else array.astype(np.float64)
    return wide.reshape(()).item()


@emits("Range")
def _range(e: Emitter, node: ir.Node) -> fx.Node:
    """From constants, sizes, or scalars that are read at run time."""
    bounds = [_scalar(e, v) for v in node.inputs if v is not None]
    kind = torch_dtype(e.dtype(node, node.inputs[0] if node.inputs[0] is not None else None))
    return e.call(torch.arange, *bounds, dtype=kind, **e.device())


def _scalar(e: Emitter, v: ir.Value) -> Any:
    number = ratio(e, v)
    if number is not None:
        return number
    entries = e.ints(v)
    return entries[0] if entries else e.method("item", e.value(v))


@emits("EyeLike")
def _eye_like(e: Emitter, node: ir.Node) -> fx.Node:
    kind, k = attribute(node, "dtype"), attribute(node, "k", 0)
    dtype = torch_dtype(ir.DataType(kind) if kind else e.dtype(node, node.inputs[0]))
    ones = e.call(torch.ones_like, first(e, node), dtype=dtype)
    return e.call(torch.tril, e.call(torch.triu, ones, k), k)
