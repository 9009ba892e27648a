"""Which entries of a small computed number depend on a dynamic size.

That an entry is equal at two choices of sizes does not make it a constant: ``T % 32`` is 0 at all multiples of 32, and
``min(T, 64)`` is 64 at all large T. So dependence is followed entry by entry, from the dynamic entries of a Shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.constants import evaluate
from cipm_ir.ir.labels import Array
from cipm_ir.ir.shapes import Shapes

_MOVES = {"Identity", "Gather", "Squeeze", "Unsqueeze", "Slice", "Reshape", "Transpose", "Expand"}
"""Operators that hand entries of their first input on; where to is up to their other inputs."""
_EACH = {
    *("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "Equal", "Less", "Greater"),
    *("Cast", "Neg", "Not", "Floor", "Ceil", "Sqrt"),
}
"""Operators each entry of whose result comes from the entries at its place."""
_REDUCES = {"ReduceProd", "ReduceSum", "ReduceMax", "ReduceMin"}


def note_varying(
    known: dict[str, Array], shapes: Shapes, node: ir.Node, args: Sequence[Array | None], result: Array
) -> None:
    """Note which entries of the number that a node computes depend on a dynamic size.

    Args:
        known: by value, which of its entries do; not there where none does. Added to.
        shapes: of the values, at several choices of the dynamic sizes.
        node: the node.
        args: the numbers that its inputs are, None where one is left out.
        result: the number that its output is.
    """
    found: Array | None
    if node.op_type in ("Shape", "Size") and node.inputs[0] is not None:
        found = _varying_sizes(shapes, node.inputs[0].name or "")
        found = evaluate(node, [], tuple(found), 0) if node.op_type == "Shape" else np.asarray(found.any())
    else:
        found = varying_entries(
            node, args, [None if v is None else known.get(v.name or "") for v in node.inputs], result
        )
    if found is not None and found.any():
        known[node.outputs[0].name or ""] = found.astype(bool)


def _varying_sizes(shapes: Shapes, name: str) -> Array:
    first = shapes.first[name]
    varies = np.zeros(len(first), bool)
    for table in (shapes.second, *shapes.others):
        other = table.get(name)
        if other is not None:
            varies |= np.not_equal(first, other) if len(other) == len(first) else True
    return varies


def varying_entries(
    node: ir.Node, args: Sequence[Array | None], varies: Sequence[Array | None], result: Array
) -> Array | None:
    """Return which entries of a result depend on a dynamic size, None where none does.

    Args:
        node: what computed the result.
        args: its inputs, None where one is left out.
        varies: which entries of them do; None where none does.
        result: its value.
    """
    if all(v is None for v in varies):
        return None
    found = _varying(node, args, varies, result.shape)
    if found is None or found.shape != result.shape:
        found = np.ones(result.shape, bool)
    return found if found.any() else None


def _varying(
    node: ir.Node, args: Sequence[Array | None], varies: Sequence[Array | None], shape: tuple[int, ...]
) -> Array | None:
    """Return the same; None where any entry may depend on any."""
    kind = node.op_type
    masks: list[Array | None] = [
        None if a is None else np.zeros(a.shape, bool) if v is None else v for a, v in zip(args, varies, strict=True)
    ]
    given = [m for m in masks if m is not None]
    if kind in _EACH:
        return np.asarray(np.any([np.broadcast_to(m, shape) for m in given], axis=0))
    if kind == "Concat":
        return evaluate(node, masks, None, 0)
    if kind == "Where" and len(given) == 3 and args[0] is not None:
        condition, yes, no = given
        return np.broadcast_to(condition | np.where(args[0].astype(bool), yes, no), shape)
    if any(v is not None for v in varies[1:]):
        return None
    if kind in _MOVES:
        return evaluate(node, [masks[0], *args[1:]], None, 0)
    if kind in _REDUCES and masks[0] is not None:
        plain = np.ones(masks[0].shape, np.int64)
        moved = plain + masks[0] if kind == "ReduceMax" else plain - masks[0]
        results = [evaluate(node, [a, *args[1:]], None, 0) for a in (plain, moved)]
        return np.not_equal(results[0], results[1]) if results[0] is not None and results[1] is not None else None
    return None
