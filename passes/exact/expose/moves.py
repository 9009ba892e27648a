"""Where an axis goes when a value is only moved: copied, reshaped, transposed, sliced or averaged over other axes."""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir

from cipm_ir.ir.constants import attribute
from cipm_ir.passes.exact.expose.rewriter import GraphRewriter

Rule = Callable[[GraphRewriter, ir.Node, int], int | None]


def moved_axis(draft: GraphRewriter, node: ir.Node, index: int, axis: int) -> int | None:
    """Return the axis of the outputs that carries an axis of input ``index``; None where the node is no such move.

    The node acts on every unit of the axis alike and on its own, and takes a constant to itself; no unit goes.
    """
    rule = _RULES.get(node.op_type)
    return rule(draft, node, axis) if rule is not None and not node.domain and index == 0 else None


def source_axis(draft: GraphRewriter, node: ir.Node, axis: int) -> int | None:
    """Return the axis of the data that a move carries to this axis of its output."""
    rank = draft.rank(node.inputs[0]) or 0
    return next((a for a in range(rank) if moved_axis(draft, node, 0, a) == axis), None)


def moved_outputs(node: ir.Node) -> list[ir.Value]:
    """Return the outputs of a move that carry the data."""
    return list(node.outputs) if node.op_type == "Split" else [node.outputs[0]]


def _copied(draft: GraphRewriter, node: ir.Node, axis: int) -> int | None:
    return axis


def _dropped_out(draft: GraphRewriter, node: ir.Node, axis: int) -> int | None:
    training = len(node.inputs) > 2 and node.inputs[2] is not None and draft.scalar(node.inputs[2]) != 0.0
    return None if training else axis


def _transposed(draft: GraphRewriter, node: ir.Node, axis: int) -> int | None:
    rank = draft.rank(node.inputs[0])
    return None if rank is None else list(attribute(node, "perm", range(rank - 1, -1, -1))).index(axis)


def _reshaped(draft: GraphRewriter, node: ir.Node, axis: int) -> int | None:
    """The axis stays where it is whole in the new shape, whatever the dynamic sizes are."""
    before, after = draft.sizes(node.inputs[0]), draft.sizes(node.outputs[0])
    if before is None or after is None:
        return None
    found = {_whole(a, b, axis) for a, b in zip(before, after, strict=True)}
    return found.pop() if len(found) == 1 else None


def _whole(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> int | None:
    size, behind = before[axis], math.prod(before[axis + 1 :])
    if size < 2:
        return None
    return next((k for k, n in enumerate(after) if n == size and math.prod(after[k + 1 :]) == behind), None)


def _expanded(draft: GraphRewriter, node: ir.Node, axis: int) -> int | None:
    before, after = draft.sizes(node.inputs[0]), draft.sizes(node.outputs[0])
    if before is None or after is None:
        return None
    place = axis + len(after[0]) - len(before[0])
    return place if all(a[place] == b[axis] for b, a in zip(before, after, strict=True)) else None


def _gathered(draft: GraphRewriter, node: ir.Node, axis: int) -> int | None:
    rank, indices = draft.rank(node.inputs[0]), draft.rank(node.inputs[1])
    if rank is None or indices is None:
        return None
    along = int(attribute(node, "axis", 0)) % rank
    return None if axis == along else axis if axis < along else axis + indices - 1


def _sliced(draft: GraphRewriter, node: ir.Node, axis: int) -> int | None:
    rank = draft.rank(node.inputs[0])
    axes = attribute(node, "axes")
    if axes is None and len(node.inputs) > 3 and node.inputs[3] is not None:
        found = draft.constant(node.inputs[3])
        axes = None if found is None else found.ravel().tolist()
    if axes is None or rank is None:
        return None
    return None if axis in [int(a) % rank for a in axes] else axis


def _parted(draft: GraphRewriter, node: ir.Node, axis: int) -> int | None:
    rank = draft.rank(node.inputs[0])
    return None if rank is None or int(attribute(node, "axis", 0)) % rank == axis else axis


def _averaged(draft: GraphRewriter, node: ir.Node, axis: int) -> int | None:
    rank = draft.rank(node.inputs[0])
    axes = attribute(node, "axes")
    if axes is None and len(node.inputs) > 1:
        found = draft.constant(node.inputs[1])
        axes = None if found is None else found.ravel().tolist()
    if rank is None or not axes:
        return None
    gone = {int(a) % rank for a in axes}
    if axis in gone:
        return None
    return axis if attribute(node, "keepdims", 1) else axis - sum(a < axis for a in gone)


def _pooled(draft: GraphRewriter, node: ir.Node, axis: int) -> int | None:
    return 1 if axis == 1 else None


_RULES: dict[str, Rule] = {
    "Identity": _copied,
    "Dropout": _dropped_out,
    "Transpose": _transposed,
    "Reshape": _reshaped,
    "Flatten": _reshaped,
    "Squeeze": _reshaped,
    "Unsqueeze": _reshaped,
    "Expand": _expanded,
    "Gather": _gathered,
    "Slice": _sliced,
    "Split": _parted,
    "ReduceMean": _averaged,
    "GlobalAveragePool": _pooled,
}
