"""Replacing one value by another that is always equal to it, without losing a name that a caller knows."""

from __future__ import annotations

import onnx_ir as ir

from cipm_ir.ir.labels import Array
from cipm_ir.ir.nested import subgraphs
from cipm_ir.runtime.graphs import all_graphs


def replace_value(old: ir.Value, new: ir.Value) -> bool:
    """Let every consumer of a node's output use an equal value instead; return whether nothing needs the output then.

    An output of a graph keeps its name, type and shape: ``new`` takes them over where it is an inner value of that same
    graph. Where it cannot (it is an input, an initializer, an output already, or comes from an outer graph), the output
    stays with the node that makes it.
    """
    for use in tuple(old.uses()):
        use.node.replace_input_with(use.idx, new)
    if not old.is_graph_output():
        return True
    maker, other = old.producer(), new.producer()
    if maker is None or other is None or other.graph is not maker.graph or maker.graph is None:
        return False
    outputs = maker.graph.outputs
    if new.is_graph_output() or sum(value is old for value in outputs) != 1:
        return False
    place = next(k for k, value in enumerate(outputs) if value is old)
    name, old.name = old.name, new.name
    outputs[place] = new
    new.name, new.type, new.shape = name, old.type or new.type, old.shape
    return True


def is_unused(node: ir.Node) -> bool:
    """Return whether no output of a node is consumed or handed on by a graph, its own or another."""
    return not any(value.uses() or value.is_graph_output() for value in node.outputs)


def remove_if_unused(node: ir.Node) -> bool:
    """Remove a node whose outputs nothing needs; return whether it is gone."""
    if node.graph is None or not is_unused(node):
        return False
    node.graph.remove(node, safe=True)
    _release(node)
    return True


def _release(node: ir.Node) -> None:
    """Let the subgraphs of a removed node consume nothing any more: outer values would look needed."""
    for graph in subgraphs(node):
        for inner in graph:
            for index in range(len(inner.inputs)):
                inner.replace_input_with(index, None)
            _release(inner)


def remove_unused(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing needs, last ones first; inputs stay, overridable ones too."""
    for root in (model.graph, *(function.graph for function in model.functions.values())):
        _remove_nodes(root)
    for graph in all_graphs(model):
        for name, value in list(graph.initializers.items()):
            if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
                del graph.initializers[name]


def _remove_nodes(graph: ir.Graph) -> None:
    for node in reversed(list(graph)):
        if not remove_if_unused(node):
            for inner in subgraphs(node):
                _remove_nodes(inner)


def constant_before(node: ir.Node, array: Array, name: str) -> ir.Value:
    """Insert a Constant node before a node; return its output."""
    assert node.graph is not None
    tensor = ir.tensor(array, name=name)
    out = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
    node.graph.insert_before(node, ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], outputs=[out]))
    return out
