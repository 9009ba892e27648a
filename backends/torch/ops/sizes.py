"""Integer arithmetic on sizes, written as Python integers instead of tensors.

A size array is an object array (rank 0 or 1 in practice) whose entries are numbers or fx nodes that compute numbers.
Moving operators act on the array, arithmetic writes `operator.*` calls and folds numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from cipm_ir.backends.torch.facts import CHAIN, Int
from cipm_ir.ir.constants import attribute, evaluate

__all__ = ["ceil_div", "compute", "maximum", "multiply", "size_entries", "tensor_of_sizes"]

_MOVES = ("Identity", "Gather", "Concat", "Squeeze", "Unsqueeze", "Slice", "Reshape", "Expand", "ScatterElements")
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": operator.floordiv,
    "Min": torch.sym_min,
    "Max": torch.sym_max,
}


class SizeWriter(Protocol):
    """What arithmetic on sizes asks of `cipm_ir.backends.torch.emitter.Emitter`."""

    graph: fx.Graph
    nonnegative: set[fx.Node]
    version: int

    def device(self) -> dict[str, fx.Node]:
        """The device of the program, as a keyword."""

    def constant(self, v: ir.Value | None) -> np.ndarray | None:
        """A value that is the same in every run."""

    def size_array(self, v: ir.Value) -> np.ndarray | None:
        """An integer value as an array of sizes; None where it is a tensor."""

    def rank(self, node: ir.Node, v: ir.Value | None) -> int:
        """The rank of a value."""

    def size(self, v: ir.Value, axis: int) -> Int:
        """The size of one axis."""


def compute(e: SizeWriter, function: Callable[[Any, Any], Any], a: Int, b: Int) -> Int:
    """`function(a, b)`: a number where both are, else a node. Which nodes cannot be negative is kept track of."""
    if not isinstance(a, fx.Node) and not isinstance(b, fx.Node):
        if function is torch.sym_max:
            return max(a, b)
        return min(a, b) if function is torch.sym_min else int(function(a, b))
    if (function is operator.mul and b == 1) or (function is operator.add and b == 0):
        return a
    if (function is operator.mul and a == 1) or (function is operator.add and a == 0):
        return b
    if function is operator.floordiv and b == 1:
        return a
    node = e.graph.call_function(function, (a, b))
    either = function is torch.sym_max
    signs = [_nonnegative(e, a), _nonnegative(e, b)]
    if function is not operator.sub and (any(signs) if either else all(signs)):
        e.nonnegative.add(node)
    return node


def multiply(e: SizeWriter, entries: Sequence[Int]) -> Int:
    """Product of sizes, 1 for none."""
    total: Int = 1
    for n in entries:
        total = compute(e, operator.mul, total, n)
    return total


def ceil_div(e: SizeWriter, a: Int, b: int) -> Int:
    """a / b rounded up."""
    return compute(e, operator.floordiv, compute(e, operator.add, a, b - 1), b)


def maximum(e: SizeWriter, a: Int, b: Int) -> Int:
    """The larger of two sizes."""
    return compute(e, torch.sym_max, a, b)


def _nonnegative(e: SizeWriter, a: Int) -> bool:
    return a in e.nonnegative if isinstance(a, fx.Node) else a >= 0


def tensor_of_sizes(e: SizeWriter, entries: np.ndarray) -> fx.Node:
    """The int64 tensor of a size array."""
    device = e.device()
    if entries.ndim == 0:
        return e.graph.call_function(torch.scalar_tensor, (entries.item(),), {"dtype": torch.int64, **device})
    parts = [
        e.graph.call_function(torch.scalar_tensor, (n,), {"dtype": torch.int64, **device}) for n in entries.ravel()
    ]
    flat = e.graph.call_function(torch.stack, (parts,))
    return flat if entries.ndim == 1 else e.graph.call_function(torch.reshape, (flat, list(entries.shape)))


def size_entries(e: SizeWriter, node: ir.Node) -> np.ndarray | None:
    """The size array that a node computes from sizes; None where it is to be written on tensors."""
    kind = node.op_type
    if kind not in CHAIN or node.domain or len(node.outputs) != 1:
        return None
    if kind in ("Shape", "Size"):
        return _of_shape(e, node)
    given = [v for v in node.inputs if v is not None]
    arrays = [e.size_array(v) if k == 0 or kind not in _MOVES else e.constant(v) for k, v in enumerate(given)]
    if kind in ("Concat", "Where"):
        arrays = [e.size_array(v) if kind == "Concat" or k else e.constant(v) for k, v in enumerate(given)]
    present = [a for a in arrays if a is not None]
    if len(present) < len(given) or not present or not any(a.dtype == object for a in present):
        return None
    return _entries(e, node, present)


def _entries(e: SizeWriter, node: ir.Node, arrays: list[np.ndarray]) -> np.ndarray | None:
    kind = node.op_type
    if kind == "ScatterElements" and (arrays[0].ndim != 1 or attribute(node, "reduction", "none") != "none"):
        return None
    if kind in _MOVES:
        return evaluate(node, list(arrays), None, e.version)
    if kind == "Cast":
        return arrays[0] if ir.DataType(attribute(node, "to")) in (ir.DataType.INT64, ir.DataType.INT32) else None
    if kind == "Where":
        return np.where(arrays[0].astype(bool), arrays[1], arrays[2])
    if kind == "Equal":
        return _equal(e, *arrays)
    if kind == "ReduceProd":
        return _product(e, node, arrays[0])
    function = _ARITHMETIC.get(kind)
    if function is None or (kind == "Div" and not _exact(e, *arrays)):
        return None
    return _elementwise(lambda a, b: compute(e, function, a, b), arrays)


def _elementwise(function: Callable[[Int, Int], Any], arrays: Sequence[np.ndarray]) -> np.ndarray:
    out = arrays[0]
    for other in arrays[1:]:
        pairs = np.broadcast(out, other)
        made = np.empty(pairs.shape, dtype=object)
        made.ravel()[...] = [function(a, b) for a, b in pairs]
        out = made
    return out


def _exact(e: SizeWriter, a: np.ndarray, b: np.ndarray) -> bool:
    """Whether rounding down is ONNX's rounding towards zero: nothing is negative."""
    return all(_nonnegative(e, n) for n in (*a.ravel(), *b.ravel()))


def _equal(e: SizeWriter, a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    """Known where both are numbers, and where a size meets a negative number (the -1 of a shape)."""
    answers = _elementwise(lambda p, q: _same(e, p, q), [a, b])
    return None if any(answer is None for answer in answers.ravel()) else answers


def _same(e: SizeWriter, p: Int, q: Int) -> bool | None:
    if p is q or not (isinstance(p, fx.Node) or isinstance(q, fx.Node)):
        return p == q
    negative = any(not isinstance(n, fx.Node) and n < 0 for n in (p, q))
    return False if negative and (_nonnegative(e, p) or _nonnegative(e, q)) else None


def _product(e: SizeWriter, node: ir.Node, array: np.ndarray) -> np.ndarray | None:
    if array.ndim != 1:
        return None
    total = np.array(multiply(e, list(array)), dtype=object)
    return total.reshape(1) if attribute(node, "keepdims", 1) else total


def _of_shape(e: SizeWriter, node: ir.Node) -> np.ndarray:
    v = node.inputs[0]
    assert v is not None
    axes = range(e.rank(node, v))
    if node.op_type == "Size":
        return np.array(multiply(e, [e.size(v, a) for a in axes]), dtype=object)
    chosen = list(axes)[slice(attribute(node, "start", 0), attribute(node, "end"))]
    out = np.empty(len(chosen), dtype=object)
    out[...] = [e.size(v, a) for a in chosen]
    return out
