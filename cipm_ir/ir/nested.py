"""Graphs inside graphs: the attributes of If, Loop and Scan, and of whatever else holds one."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

_KINDS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """Return the graphs that a node holds as attributes."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.data.values():  # the dict inside: its wrapper takes most of the time
        if attribute.type not in _KINDS or attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        else:
            found.extend(attribute.as_graphs())
    return found


def graphs_within(graph: ir.Graph) -> list[ir.Graph]:
    """Return a graph, and every graph below it, outer ones first."""
    found = [graph]
    for node in graph:
        for inner in subgraphs(node):
            found.extend(graphs_within(inner))
    return found


def nodes_within(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield the nodes of a graph, each in front of those that it holds."""
    for node in graph:
        yield node
        for inner in subgraphs(node):
            yield from nodes_within(inner)


def captured_values(node: ir.Node) -> list[ir.Value]:
    """Return values of outer graphs that the subgraphs of a node use."""
    found: list[ir.Value] = []
    for graph in subgraphs(node):
        inside = {v for n in graph for v in n.outputs} | set(graph.inputs) | set(graph.initializers.values())
        for inner in graph:
            found.extend(v for v in inner.inputs if v is not None and v not in inside)
            found.extend(v for v in captured_values(inner) if v not in inside)
        found.extend(v for v in graph.outputs if v not in inside)
    return found
