"""Merging of nodes of one graph that compute the same: equal operators, inputs and attributes, bit for bit.

Never merged: operators that may give something else in every run, operators with subgraphs, operators of other domains
(and functions that contain any of these), nodes of different graphs, nodes that give different outputs, and Constant
nodes of more than a few entries, which are weights. An output of a graph keeps its name; where two outputs of graphs
would need one value, both nodes stay.

Why onnx_ir's pass is not used: to it 0.0 equals -0.0, and Bernoulli, Dropout and unknown operators give the same
twice.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.nested import graphs_within, subgraphs
from cipm_ir.passes.exact.cleanup.fold_constants import DRAWS
from cipm_ir.passes.exact.cleanup.replace_values import remove_if_unused, replace_value

_LITERAL = 10
"""Entries of a constant attribute at most: what has more is a weight, which may be tied or not."""


def merge_nodes(model: ir.Model) -> None:
    """Merge equal nodes in each graph of a model, in place."""
    repeatable = _repeatable_functions(model)
    for root in (model.graph, *(function.graph for function in model.functions.values())):
        for graph in graphs_within(root):
            _merge(graph, repeatable)


def _merge(graph: ir.Graph, repeatable: set[ir.OperatorIdentifier]) -> None:
    first: dict[Hashable, ir.Node] = {}
    for node in list(graph):
        key = _key(node, repeatable)
        kept = node if key is None else first.setdefault(key, node)
        if kept is not node:
            for old, new in zip(node.outputs, kept.outputs, strict=True):
                replace_value(old, new)
            remove_if_unused(node)


def _key(node: ir.Node, repeatable: set[ir.OperatorIdentifier]) -> Hashable | None:
    if not _repeats(node, repeatable):
        return None
    attributes = []
    for name, attribute in sorted(node.attributes.items()):
        content = _content(attribute)
        if content is None:
            return None
        attributes.append((name, content))
    inputs = tuple(0 if value is None else id(value) for value in node.inputs)
    return node.op_identifier(), node.version, inputs, tuple(attributes), tuple(bool(v.name) for v in node.outputs)


def _content(attribute: ir.Attr) -> Hashable | None:
    """Return an attribute to compare by its bits; None where it is not to be compared."""
    kind = attribute.type
    if attribute.is_ref():
        return "reference", kind, attribute.ref_attr_name
    if kind in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
        numbers = [attribute.value] if kind == ir.AttributeType.FLOAT else list(attribute.value)
        return kind, struct.pack(f"{len(numbers)}d", *numbers)
    if kind in (ir.AttributeType.INT, ir.AttributeType.STRING):
        return kind, attribute.value
    if kind in (ir.AttributeType.INTS, ir.AttributeType.STRINGS):
        return kind, tuple(attribute.value)
    if kind != ir.AttributeType.TENSOR:
        return None
    tensor: ir.TensorProtocol = attribute.value
    if tensor.size > _LITERAL or tensor.dtype == ir.DataType.STRING:
        return None
    return kind, tensor.dtype, tuple(tensor.shape.numpy()), np.ascontiguousarray(tensor.numpy()).tobytes()


def _repeats(node: ir.Node, repeatable: set[ir.OperatorIdentifier]) -> bool:
    """Return whether a node gives the same for the same inputs in one run."""
    if any(True for _ in subgraphs(node)):
        return False
    if node.op_identifier() in repeatable:
        return True
    return not node.domain and node.op_type not in DRAWS


def _repeatable_functions(model: ir.Model) -> set[ir.OperatorIdentifier]:
    """Functions all of whose nodes repeat; a function may call others, in any order of definition."""
    found: set[ir.OperatorIdentifier] = set()
    while True:
        more = {
            name
            for name, function in model.functions.items()
            if name not in found and all(_repeats(node, found) for node in function)
        }
        if not more:
            return found
        found |= more
