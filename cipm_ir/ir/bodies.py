"""Bodies of If, Loop and Scan as parts of one analysed graph.

The walk visits the nodes of a body in front of the node that holds it, as if they stood there, so that units inside a
body are like any others. For that, names must be unique in the whole model: ONNX lets the branches of an If use the
same ones, and `merge_bodies` renames those that collide. Initializers and weights in Constant nodes of bodies become
initializers of the main graph, which ONNX lets bodies use, so that all parameters are found in one place.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from cipm_ir.ir.lifted import held_weights, put_back
from cipm_ir.ir.parameters import is_overridable, named

_HOME = "cipm_ir.home"
"""In `Value.meta` of an initializer that a body holds in the file: where, as `Home`."""
_RENAMED = "cipm_ir.renamed"
"""In `Graph.meta` of the main graph: names that stand for more than one value in the file."""

Home = tuple[tuple[tuple[str, str], ...], str]
"""Bodies from the outside in, each as (first output of the node that holds it, attribute); then the value's name."""


def is_control_flow(node: ir.Node) -> bool:
    """Return whether a node is an If, Loop or Scan, whose bodies the analysis walks."""
    return node.op_type in ("If", "Loop", "Scan") and not node.domain


def bodies(node: ir.Node) -> list[tuple[str, ir.Graph]]:
    """Return the bodies of an If (then_branch first), Loop or Scan with their attributes' names; else an empty list."""
    if not is_control_flow(node):
        return []
    found = [(key, attr.as_graph()) for key, attr in node.attributes.items() if attr.type == ir.AttributeType.GRAPH]
    return sorted(found, key=lambda pair: pair[0], reverse=True)


def nodes_in_order(graph: ir.Graph) -> list[ir.Node]:
    """Return the nodes of a graph in the order of the walk: those of a body right before the node that holds it."""
    found: list[ir.Node] = []
    for node in graph:
        for _, body in bodies(node):
            found.extend(nodes_in_order(body))
        found.append(node)
    return found


def body_graphs(
    graph: ir.Graph, outer: str = "", home: tuple[tuple[str, str], ...] = ()
) -> Iterator[tuple[str, tuple[tuple[str, str], ...], ir.Graph]]:
    """Yield every body below a graph, outer ones first: its path (``If_12.then/Loop_3``), its home, and the graph."""
    for node in graph:
        first = next((value.name for value in node.outputs if value.name), None) or ""
        for key, body in bodies(node):
            path = body_path(outer, node, key)
            yield path, (*home, (first, key)), body
            yield from body_graphs(body, path, (*home, (first, key)))


def body_path(outer: str, node: ir.Node, key: str) -> str:
    """Return the path of a body that a node holds under an attribute, where the node stands in the body ``outer``.

    A node without a name goes by its first output.
    """
    own = node.name or next((value.name for value in node.outputs if value.name), None) or node.op_type
    label = own if key == "body" else f"{own}.{key.removesuffix('_branch')}"
    return f"{outer}/{label}" if outer else label


def qualified(node: ir.Node, path: str) -> str:
    """Return the name of a node with the body that it stands in; without one by its first output."""
    return f"{path}/{node.name or node.outputs[0].name}" if path else node.name or ""


def merge_bodies(model: ir.Model) -> None:
    """Make names unique in the whole model, and parameters of bodies initializers of the main graph, in place."""
    graph = model.graph
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    taken |= {value.name for node in graph for value in node.outputs}
    renamed: set[str] = set()

    def unique(value: ir.Value, path: str) -> None:
        name = value.name or ""
        if name in taken:
            renamed.add(name)
            name, count = f"{path}/{name}", 1
            while name in taken:
                count += 1
                name = f"{path}/{value.name}#{count}"
            if value.const_value is not None:
                value.const_value = named(value.const_value, name)  # to rename a value renames its tensor, too
            value.name = name
        taken.add(name)

    for path, home, body in list(body_graphs(graph)):
        lifted: list[tuple[ir.Value, str]] = []
        for node, tensor in list(held_weights(body)):
            lifted.append((_initializer(node, tensor), node.outputs[0].name or ""))
            node.outputs[0].replace_all_uses_with(lifted[-1][0])
            body.remove(node, safe=True)
        for name, value in list(body.initializers.items()):
            if value.const_value is not None and not is_overridable(value) and not value.is_graph_output():
                del body.initializers[name]
                lifted.append((value, name))
        for value in (*body.inputs, *body.initializers.values(), *(v for node in body for v in node.outputs)):
            if value.name:
                unique(value, path)
        for value, name in lifted:
            unique(value, path)
            value.meta[_HOME] = (home, name)
            graph.register_initializer(value)
            if model.ir_version < 4:  # such files list every initializer among the inputs
                graph.inputs.append(value)
    graph.meta[_RENAMED] = frozenset(renamed)


def _initializer(node: ir.Node, tensor: ir.TensorProtocol) -> ir.Value:
    return ir.Value(
        name=node.outputs[0].name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tuple(tensor.shape.numpy())),
        const_value=tensor,
    )


def put_home(graph: ir.Graph, value: ir.Value) -> bool:
    """Give the file's own graph the tensor of an initializer that one of its bodies holds; False if none does."""
    known, tensor = value.meta.get(_HOME), value.const_value
    if known is None or tensor is None:
        return False
    home, name = known
    for first, key in home:
        holder = next((node for node in graph if any(v.name == first for v in node.outputs)), None)
        inner = None if holder is None else dict(bodies(holder)).get(key)
        if inner is None:
            return False
        graph = inner
    own = graph.initializers.get(name)
    if own is None:
        return put_back(graph, name, tensor)
    own.const_value = tensor
    return True


def names_twice(graph: ir.Graph) -> frozenset[str]:
    """Return the names that stand for more than one value in the file that a merged graph comes from."""
    found: frozenset[str] = graph.meta.get(_RENAMED, frozenset())
    return found
