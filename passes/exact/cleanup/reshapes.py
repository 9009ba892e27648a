"""Nodes that keep all entries in their order and change only the shape, and how a row of them becomes one Reshape.

| node | keeps the order |
|---|---|
| Reshape, Flatten, Squeeze, Unsqueeze | always |
| Transpose | where only axes of size 1 change places with others |

A constant target of a Reshape is exact for every size that the graph runs with: an entry is the number that is proven,
0 where the axis of the input that stands there is proven to be the same, or -1 for one size that all others leave open.
An entry 0 and a -1 of our own never stand together: with an empty batch such a Reshape fails.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.constants import attribute
from cipm_ir.ir.parameters import parameter_tensor
from cipm_ir.passes.exact.cleanup.graph_facts import Dim, Dims, GraphFacts, permutation
from cipm_ir.passes.exact.cleanup.replace_values import constant_before, remove_if_unused

_ALWAYS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_FIRST_VERSION = 5
"""From here on the target of a Reshape is an input."""


def keeps_order(node: ir.Node, facts: GraphFacts) -> bool:
    """Return whether a node gives out the entries of its first input in their order."""
    if node.domain or not node.inputs or node.inputs[0] is None:
        return False
    if node.op_type != "Transpose":
        return node.op_type in _ALWAYS
    shape, perm = facts.shape(node.inputs[0]), permutation(node, facts)
    if shape is None or perm is None or len(perm) != len(shape):
        return False
    long = [k for k in perm if shape[k] != 1]
    return long == sorted(long)


def write_target(node: ir.Node, facts: GraphFacts, version: int, name: Callable[[str], str]) -> None:
    """Give a Reshape whose target is computed a constant one, in place, where it is proven but for one size."""
    if node.op_type != "Reshape" or node.domain or version < _FIRST_VERSION or len(node.inputs) < 2:
        return
    target = node.inputs[1]
    if target is None or parameter_tensor(target) is not None or attribute(node, "allowzero", 0):
        return
    entries, shape = facts.entries(target), facts.shape(node.inputs[0])
    if entries is None or (any(isinstance(d, str) for d in entries) and not _fits(entries, shape)):
        return
    made = _target(entries, shape, copies=True)
    if made is not None and not _contradicts(node.outputs[0], made):
        node.replace_input_with(1, constant_before(node, made, name("target")))


def join_reshapes(
    before: ir.Node, node: ir.Node, facts: GraphFacts, version: int, name: Callable[[str], str]
) -> ir.Value | None:
    """Write two nodes in a row that keep the order as one.

    A Reshape is changed in place; anything else becomes a new Reshape of the input of the node before, which is
    returned, or that input where the shape is the same.
    """
    if version < _FIRST_VERSION or not (keeps_order(before, facts) and keeps_order(node, facts)):
        return None
    source, middle = before.inputs[0], node.inputs[0]
    if node.op_type == "Reshape":
        tensor = parameter_tensor(node.inputs[1]) if len(node.inputs) > 1 else None
        if tensor is None or attribute(node, "allowzero", 0):
            return None
        entries: list[Dim] = [int(d) for d in np.asarray(tensor.numpy()).reshape(-1)]
        made = _target(_without_copies(entries, facts.shape(middle)), facts.shape(source), copies=False)
        if made is not None:
            node.replace_input_with(1, constant_before(node, made, name("target")))
            node.replace_input_with(0, source)
        return None
    shape = facts.shape(node.outputs[0])
    if shape is not None and None not in shape and shape == facts.shape(source):
        return source
    made = None if shape is None or 0 in shape else _target(list(shape), facts.shape(source), copies=False)
    if made is None or node.graph is None:
        return None
    out = ir.Value(name=name("reshaped"), type=node.outputs[0].type, shape=node.outputs[0].shape)
    target = constant_before(node, made, name("target"))
    node.graph.insert_before(node, ir.Node("", "Reshape", [source, target], outputs=[out]))
    return out


def turn_before_merging(node: ir.Node, facts: GraphFacts, version: int, name: Callable[[str], str]) -> None:
    """Let a Reshape take its entries from a Transpose of unmerged axes.

    Reshape, Transpose, Reshape, where the first makes each of its axes of whole axes of its input, is one Transpose
    that moves these axes together, and the last Reshape, which is nothing where it splits what the first has merged
    (as exporters write the transposed keys of an attention).
    """
    turn = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    merge = turn.inputs[0].producer() if turn is not None and turn.op_type == "Transpose" and turn.inputs[0] else None
    if turn is None or merge is None or node.graph is None or version < _FIRST_VERSION:
        return
    if {n.graph for n in (merge, turn)} != {node.graph} or merge.domain or turn.domain:
        return
    if node.op_type != "Reshape" or len(node.inputs) < 2 or attribute(node, "allowzero", 0):
        return
    if not keeps_order(merge, facts) or any(_needed_elsewhere(n.outputs[0]) for n in (merge, turn)):
        return
    target, perm = parameter_tensor(node.inputs[1]), permutation(turn, facts)
    shape, middle, turned = (facts.shape(v) for v in (merge.inputs[0], turn.inputs[0], node.inputs[0]))
    if target is None or perm is None or shape is None or middle is None:
        return
    groups = merged_axes(shape, middle)
    if groups is None or len(groups) == len(shape):
        return
    entries: list[Dim] = [int(d) for d in np.asarray(target.numpy()).reshape(-1)]
    axes = [axis for k in perm for axis in groups[k]]
    made = _target(_without_copies(entries, turned), tuple(shape[k] for k in axes), copies=False)
    if made is None:
        return
    out = ir.Value(name=name("turned"), type=turn.outputs[0].type)
    moved = ir.Node("", "Transpose", [merge.inputs[0]], [ir.AttrInt64s("perm", axes)], outputs=[out])
    node.graph.insert_before(node, moved)
    facts.learn(moved, version)
    node.replace_input_with(1, constant_before(node, made, name("target")))
    node.replace_input_with(0, out)
    for gone in (turn, merge):
        remove_if_unused(gone)


def merged_axes(shape: Dims, merged: Dims) -> list[list[int]] | None:
    """Return, for each axis of a merged shape, the axes that it is made of; None where that is not proven.

    Sizes are compared from both ends; one axis in the middle may have a size that is not known, or is a product.
    """
    if None in shape or 0 in shape:
        return None
    left: list[list[int]] = []
    first, last = 0, len(shape)
    for size in merged:
        end = _product_ends(shape[first:last], size)
        if end is None:
            break
        left.append([*range(first, first + end)])
        first += end
    right: list[list[int]] = []
    for size in reversed(merged[len(left) :]):
        end = _product_ends(shape[first:last][::-1], size)
        if end is None:
            break
        right.append([*range(last - end, last)])
        last -= end
    open_ones = len(merged) - len(left) - len(right)
    if open_ones > 1 or (open_ones == 0 and first != last) or (open_ones == 1 and first == last):
        return None
    return [*left, *([[*range(first, last)]] * open_ones), *reversed(right)]


def _product_ends(sizes: Dims, size: Dim) -> int | None:
    """Return how many of the first sizes multiply to one; None where that is not proven, or none does."""
    if sizes and size is not None and sizes[0] == size:
        return 1
    product = 1
    for k, d in enumerate(sizes):
        if not isinstance(d, int) or not isinstance(size, int):
            return None
        product *= d
        if product >= size:
            return k + 1 if product == size else None
    return None


def _needed_elsewhere(value: ir.Value) -> bool:
    return len(value.uses()) != 1 or value.is_graph_output()


def _fits(entries: Sequence[Dim], shape: Dims | None) -> bool:
    """Return whether sizes hold as many entries as a shape, whatever the symbols stand for.

    Or one of them is left to -1.
    """
    if shape is None or None in shape or None in entries:
        return False
    sizes = _without_copies(entries, shape)
    if None in sizes or 0 in shape:
        return False
    if sizes.count(-1) == 1:
        return True
    a, b = (Counter(d for d in dims if isinstance(d, str)) for dims in (sizes, shape))
    return a == b and math.prod(d for d in sizes if isinstance(d, int)) == math.prod(
        d for d in shape if isinstance(d, int)
    )


def _contradicts(value: ir.Value, made: np.ndarray) -> bool:
    """Return whether the file states another shape for an output: it is valid only as long as nothing can tell."""
    if not value.is_graph_output() or value.shape is None:
        return False
    pairs = zip(value.shape, made.tolist(), strict=False)
    return len(value.shape) != len(made) or any(isinstance(a, int) and b > 0 and a != b for a, b in pairs)


def _without_copies(entries: Sequence[Dim], shape: Dims | None) -> list[Dim]:
    """Write the sizes that entries of 0 copy instead of these."""
    return [
        d if d != 0 else shape[k] if shape is not None and k < len(shape) and shape[k] != 0 else None
        for k, d in enumerate(entries)
    ]


def _target(entries: Sequence[Dim], shape: Dims | None, *, copies: bool) -> np.ndarray | None:
    """Return the constant target that gives these sizes for an input of this shape; None where there is none.

    Args:
        entries: numbers, symbols, None for what is not known, -1 as in ONNX; 0 too where ``copies``.
        shape: of the input.
        copies: entries of 0 copy an axis of this input.
    """
    made: list[int] = []
    for k, d in enumerate(entries):
        if isinstance(d, int):
            if d < -1 or (d == 0 and not copies):
                return None
            made.append(d)
        else:
            same = d is not None and shape is not None and k < len(shape) and shape[k] == d
            made.append(0 if same else -1)
    given = sum(d == -1 for d in entries)
    if made.count(-1) > 1 or (made.count(-1) > given and 0 in made):
        return None
    return np.array(made, np.int64)
