"""Weights that a file holds in Constant nodes, as initializers: to the analysis and to passes both are parameters.

What is emitted keeps the Constant nodes as long as the structure of the graph does (`Program.emit`).
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from cipm_ir.ir.constants import constant_tensor

_SMALL_INTS = {ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4}


def held_weights(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.TensorProtocol]]:
    """Constant nodes of a graph, not of its subgraphs, that hold a tensor that could be a weight."""
    for node in graph:
        if node.op_type != "Constant" or node.domain or node.outputs[0].is_graph_output():
            continue
        tensor = constant_tensor(node)
        if tensor is None or tensor.size < 2 or not len(tensor.shape):
            continue
        if tensor.dtype.is_floating_point() or tensor.dtype in _SMALL_INTS:
            yield node, tensor


def lift_weights(model: ir.Model) -> None:
    """Write those weights as initializers of the same name, in place."""
    for node, tensor in list(held_weights(model.graph)):
        old = node.outputs[0]
        value = ir.Value(
            name=old.name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tuple(tensor.shape.numpy())),
            const_value=tensor,
        )
        for use in list(old.uses()):
            use.node.replace_input_with(use.idx, value)
        model.graph.remove(node, safe=True)
        model.graph.register_initializer(value)
        if model.ir_version < 4:  # such files list every initializer among the inputs
            model.graph.inputs.append(value)


def put_back(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> bool:
    """Give the Constant node that makes a value another tensor of the same shape; False where there is none."""
    node = next((n for n in graph if n.op_type == "Constant" and n.outputs[0].name == name), None)
    if node is None:
        return False
    for key in [k for k in node.attributes if k.startswith("value")]:
        del node.attributes[key]
    node.attributes["value"] = ir.AttrTensor("value", tensor)
    return True
