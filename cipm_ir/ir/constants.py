"""Evaluation of the small integer chains that compute shapes and indices (Shape, Gather, Concat, ...).

Evaluated under each of the two shape assignments of `shapes`, so that a result that depends on a dynamic dimension is
known as such. Anything larger than a few thousand entries, or outside the table, is simply not a constant.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.labels import Array

LIMIT = 1 << 16
Evaluator = Callable[[ir.Node, list[Array], int], Array]


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Return the value of an attribute as a plain Python object, or ``default``."""
    attr = node.attributes.get(name)
    return default if attr is None else attr.value


def constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """Tensor held by a Constant node, whichever attribute form it uses."""
    for name, attr in node.attributes.items():
        if attr.is_ref():  # an attribute of the function around it
            return None
        if name == "value":
            tensor: ir.TensorProtocol = attr.value  # as_tensor would check the whole protocol each time
            return tensor
        if name in ("value_int", "value_ints"):
            return ir.tensor(np.asarray(attr.value, dtype=np.int64))
        if name in ("value_float", "value_floats"):
            return ir.tensor(np.asarray(attr.value, dtype=np.float32))
    return None


def is_float(array: Array) -> bool:
    """Return whether an array holds floating-point numbers; to numpy, bfloat16 is none."""
    return bool(array.dtype.kind == "f" or array.dtype.name == "bfloat16")


def _axes(node: ir.Node, args: list[Array]) -> Any:
    return args[1].tolist() if len(args) > 1 else attribute(node, "axes")


def _squeeze(node: ir.Node, args: list[Array], version: int) -> Array:
    axes = _axes(node, args)
    return np.squeeze(args[0]) if axes is None else np.squeeze(args[0], tuple(axes))


def _unsqueeze(node: ir.Node, args: list[Array], version: int) -> Array:
    return np.expand_dims(args[0], tuple(_axes(node, args)))


def _slice(node: ir.Node, args: list[Array], version: int) -> Array:
    if len(args) > 1:
        starts, ends = args[1].tolist(), args[2].tolist()
        axes = args[3].tolist() if len(args) > 3 else list(range(len(starts)))
        steps = args[4].tolist() if len(args) > 4 else [1] * len(starts)
    else:
        starts, ends = list(attribute(node, "starts")), list(attribute(node, "ends"))
        axes, steps = list(attribute(node, "axes", range(len(starts)))), [1] * len(starts)
    out = args[0]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index = slice_positions(out.shape[axis], start, end, step)
        out = out.take(index, axis=axis)
    return out


def slice_positions(size: int, start: int, end: int, step: int) -> np.ndarray:
    """Return the positions that ONNX Slice (opset 13) takes along an axis of this size.

    Raises:
        ValueError: the step is 0.
    """
    if not step:
        raise ValueError("a Slice with a step of 0")
    if step > 0:
        lo = min(max(start + size if start < 0 else start, 0), size)
        hi = min(max(end + size if end < 0 else end, 0), size)
    else:
        lo = min(max(start + size if start < 0 else start, 0), size - 1)
        hi = min(max(end + size if end < 0 else end, -1), size - 1)
    return np.arange(lo, hi, step)


def _reshape(node: ir.Node, args: list[Array], version: int) -> Array:
    target = args[1].tolist()
    if attribute(node, "allowzero", 0):
        return args[0].reshape(target)
    return args[0].reshape([args[0].shape[k] if d == 0 else d for k, d in enumerate(target)])


def _transpose(node: ir.Node, args: list[Array], version: int) -> Array:
    return args[0].transpose(attribute(node, "perm"))


def _cast(node: ir.Node, args: list[Array], version: int) -> Array:
    return args[0].astype(ir.DataType(attribute(node, "to")).numpy())


def _reduce(function: Callable[..., Any]) -> Evaluator:
    def run(node: ir.Node, args: list[Array], version: int) -> Array:
        axes = _axes(node, args)
        if not axes and attribute(node, "noop_with_empty_axes", 0):
            return args[0]
        keep = bool(attribute(node, "keepdims", 1))
        made = np.asarray(function(args[0], axis=tuple(axes) if axes else None, keepdims=keep))
        return made.astype(args[0].dtype)  # numpy sums 32-bit integers in 64 bits

    return run


def _binary(function: Callable[[Any, Any], Any]) -> Evaluator:
    return lambda node, args, version: np.asarray(function(args[0], args[1]))


def _divide(node: ir.Node, args: list[Array], version: int) -> Array:
    if np.issubdtype(args[0].dtype, np.integer):
        return np.asarray(np.trunc(args[0] / args[1])).astype(args[0].dtype)
    return np.asarray(args[0] / args[1])


def _scatter(node: ir.Node, args: list[Array], version: int) -> Array:
    if attribute(node, "reduction", "none") != "none":
        raise ValueError("a scatter that adds up is not followed")
    out = args[0].copy()
    places = list(np.indices(args[1].shape))
    places[attribute(node, "axis", 0)] = args[1]
    out[tuple(places)] = args[2]
    return out


_TABLE: dict[str, Evaluator] = {
    "Identity": lambda n, a, v: a[0],
    "Gather": lambda n, a, v: np.take(a[0], a[1], axis=attribute(n, "axis", 0)),
    "Concat": lambda n, a, v: np.concatenate(a, axis=attribute(n, "axis", 0)),
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Slice": _slice,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Cast": _cast,
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "Add": _binary(operator.add),
    "Sub": _binary(operator.sub),
    "Mul": _binary(operator.mul),
    "Div": _divide,
    "Mod": lambda n, a, v: (np.fmod if attribute(n, "fmod", 0) else np.mod)(a[0], a[1]),
    "Min": lambda n, a, v: np.minimum.reduce(a),
    "Max": lambda n, a, v: np.maximum.reduce(a),
    "Equal": _binary(operator.eq),
    "Less": _binary(operator.lt),
    "Greater": _binary(operator.gt),
    "Neg": lambda n, a, v: -a[0],
    "Not": lambda n, a, v: ~a[0],
    "Floor": lambda n, a, v: np.floor(a[0]),
    "Ceil": lambda n, a, v: np.ceil(a[0]),
    "Sqrt": lambda n, a, v: np.sqrt(a[0]),
    "Where": lambda n, a, v: np.where(a[0], a[1], a[2]),
    "Range": lambda n, a, v: np.arange(a[0].item(), a[1].item(), a[2].item(), dtype=a[0].dtype),
    "Expand": lambda n, a, v: np.broadcast_to(a[0], np.broadcast_shapes(a[0].shape, tuple(a[1].tolist()))),
    "ScatterElements": _scatter,
}


def evaluate(
    node: ir.Node, args: list[Array | None], shape: tuple[int, ...] | None, version: int, limit: int = LIMIT
) -> Array | None:
    """Return the value of a node's single output, or None where it is not a small constant (``limit`` entries).

    ``shape`` is the concrete shape of the first input, for Shape and Size.
    """
    if node.domain or len(node.outputs) != 1:
        return None
    if node.op_type in ("Shape", "Size"):
        if shape is None:
            return None
        if node.op_type == "Size":
            return np.asarray(int(np.prod(shape)), np.int64)
        start, end = attribute(node, "start", 0), attribute(node, "end")
        return np.asarray(shape[slice(start, end)], np.int64)
    run = _TABLE.get(node.op_type)
    if run is None:
        return None
    given = [a for a in args if a is not None]
    if len(given) != sum(v is not None for v in node.inputs) or not given:
        return None
    if any(v is None for v in node.inputs[: len(given)]):  # an input left out before one that is given
        return None
    try:
        out = np.asarray(run(node, given, version))
    except (ValueError, IndexError, TypeError, KeyError):
        return None
    return out if out.size <= limit else None
