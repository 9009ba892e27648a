"""What readers, writers and sessions need to know of an `onnx_ir.Model` alike."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import onnx
import onnx_ir as ir

from cipm_ir.ir.nested import graphs_within

LISTED = "cipm_ir.listed"
"""Key in `Value.meta` of an initializer for which the file has a value_info entry (onnx_ir writes one for each)."""


def all_graphs(model: ir.Model) -> list[ir.Graph]:
    """Return the main graph, the bodies of the functions, and every subgraph of these."""
    roots = [model.graph, *(function.graph for function in model.functions.values())]
    return [graph for root in roots for graph in graphs_within(root)]


@contextlib.contextmanager
def quiet(logger_name: str) -> Iterator[None]:
    """Errors only from a library's logger: its warnings are about what we handle or report ourselves."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def describe_node(node: ir.Node | onnx.NodeProto) -> str:
    """Return how a message names a node: its name and operator, or its operator and first output."""
    if node.name:
        return f"node {node.name!r} ({node.op_type})"
    outputs = node.output if isinstance(node, onnx.NodeProto) else [value.name for value in node.outputs]
    return f"the {node.op_type} node that makes {outputs[0]!r}" if outputs else f"a {node.op_type} node"


def all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield inputs, initializers and results of a graph, those of its subgraphs included."""
    for one in graphs_within(graph):
        yield from (*one.inputs, *one.initializers.values())
        for node in one:
            yield from node.outputs
