"""Folding of constants that multiply the output of a product unit by unit: the layer scale of vision transformers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import onnx_ir as ir

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.labels import Array
from cipm_ir.ops.contraction import weight_axes
from cipm_ir.passes.exact.expose.forms import aligned
from cipm_ir.passes.exact.expose.rewriter import GraphRewriter, Weight, Write

_PRODUCTS = ("MatMul", "Gemm", "Conv")


@dataclass
class Scaled:
    """How many scales were folded, and why others stayed."""

    scales: int = 0
    kept: Counter[str] = field(default_factory=Counter)


def fold_scales(draft: GraphRewriter) -> Scaled:
    """Fold ``Mul(W x + b, s)`` with a vector s along the units into W and b, where nothing else reads what is scaled.

    A stream can neither be centred nor rotated while its writers are scaled unit by unit behind their weights.
    """
    done = Scaled()
    for node in list(draft.graph):
        found = _scale(draft, node)
        if found is None:
            continue
        weight, parts, vector = found
        try:
            changes = [_multiplied(draft, part, axis, vector) for part, axis in parts]
        except UnsupportedPattern as reason:
            done.kept[str(reason)] += 1
            continue
        for change in changes:
            draft.write(change)
        source, out = node.inputs[1 - weight.index], node.outputs[0]
        assert source is not None
        out.replace_all_uses_with(source)
        done.scales += 1
    return done


def _multiplied(draft: GraphRewriter, part: Weight, axis: int, vector: Array) -> Write:
    factor = vector.reshape([-1 if k == axis else 1 for k in range(len(part.shape))])
    return draft.change(part, lambda array: array * factor)


def _scale(draft: GraphRewriter, node: ir.Node) -> tuple[Weight, list[tuple[Weight, int]], Array] | None:
    """Return the vector that a Mul holds, the constants of the product before with their axes of units.

    And its entries.
    """
    if node.op_type != "Mul" or node.domain or node.outputs[0].is_graph_output():
        return None
    weight = draft.weight(node, 0) or draft.weight(node, 1)
    source = None if weight is None else node.inputs[1 - weight.index]
    rank = draft.rank(source)
    if weight is None or source is None or rank is None:
        return None
    parts = _parts(draft, source, rank)
    axis = 1 if parts and parts[0][0].node.op_type == "Conv" else rank - 1
    sizes = draft.sizes(source)
    if not parts or sizes is None or not aligned(weight.shape, rank, axis, sizes[0][axis]):
        return None
    return weight, parts, weight.array.ravel()


def _parts(draft: GraphRewriter, source: ir.Value, rank: int) -> list[tuple[Weight, int]]:
    """Weight and bias of the product that makes a value which one node reads; empty where it is something else."""
    node = _only(draft, source, *_PRODUCTS, "Add")
    if node is None:
        return []
    if node.op_type == "Add":
        bias = draft.weight(node, 0) or draft.weight(node, 1)
        product = None if bias is None else node.inputs[1 - bias.index]
        if bias is None or product is None or draft.rank(product) != rank or not bias.shape:
            return []
        inner = _only(draft, product, "MatMul")
        sizes = draft.sizes(product)
        if inner is None or sizes is None or bias.shape[-1] != sizes[0][-1]:
            return []
        return [*_parts_of(draft, inner), (bias, len(bias.shape) - 1)]
    return _parts_of(draft, node)


def _parts_of(draft: GraphRewriter, node: ir.Node) -> list[tuple[Weight, int]]:
    weight = draft.weight(node, 1)
    if weight is None or len(weight.shape) < 2:
        return []
    _, axis = weight_axes(node, len(weight.shape))
    parts = [(weight, axis)]
    if node.op_type != "MatMul" and len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = draft.weight(node, 2)
        if bias is None or not bias.shape or bias.shape[-1] != weight.shape[axis]:
            return []
        parts.append((bias, len(bias.shape) - 1))
    return parts


def _only(draft: GraphRewriter, value: ir.Value, *ops: str) -> ir.Node | None:
    """Return the node that makes a value which only one node reads, if it is one of these operators."""
    node = value.producer()
    if node is None or node.op_type not in ops or node.domain or node.graph is not draft.graph:
        return None
    return node if len(value.uses()) == 1 and not value.is_graph_output() else None
