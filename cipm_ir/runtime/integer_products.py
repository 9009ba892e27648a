"""Exact 8-bit products on processors whose kernels saturate.

Without the VNNI instructions, onnxruntime multiplies unsigned activations by signed weights with `vpmaddubsw`, which
adds pairs of products in 16 bits and saturates: results are wrong, and depend on the order of the summands. A
comparison of two models must not blame a pass for that. onnxruntime's own precise mode
(`session.x64quantprecision`) needs its graph optimizations and has no kernels for signed activations, so that the
weights are re-encoded here: w - z is the same number as (w + 128) - (z + 128), in unsigned integers, whose kernels are
exact on every processor.
"""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper

from cipm_ir.ir.nested import graphs_within

WEIGHT_INPUTS: dict[tuple[str, str], tuple[int, int, int]] = {
    ("", "MatMulInteger"): (0, 1, 3),
    ("", "ConvInteger"): (0, 1, 3),
    ("", "QLinearConv"): (0, 3, 5),
    ("", "QLinearMatMul"): (0, 3, 5),
    ("com.microsoft", "QGemm"): (0, 3, 5),
    ("com.microsoft", "MatMulIntegerToFloat"): (0, 1, 5),
    ("com.microsoft", "DynamicQuantizeMatMul"): (0, 1, 3),
}
"""Positions of the activations, the weight and the weight's zero point among the inputs of an operator."""


@functools.cache
def processor_saturates() -> bool:
    """Return whether onnxruntime's product of uint8 and int8 is inexact on this processor."""
    shapes = {"a": (TensorProto.UINT8, [1, 4]), "b": (TensorProto.INT8, [4, 1]), "y": (TensorProto.INT32, [1, 1])}
    values = {name: helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in shapes.items()}
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    graph = helper.make_graph([node], "probe", [values["a"], values["b"]], [values["y"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"a": np.full((1, 4), 255, np.uint8), "b": np.full((4, 1), 127, np.int8)}
    return int(session.run(None, feeds)[0][0, 0]) != 4 * 255 * 127


def computes_in_integers(model: ir.Model) -> bool:
    """Return whether a model multiplies 8-bit integers, or may do so once onnxruntime has fused its operators."""
    graphs = graphs_within(model.graph)
    return any(
        node.op_type in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
        or (node.domain, node.op_type) in WEIGHT_INPUTS
        for graph in graphs
        for node in graph
    )


def reencode_signed_weights(model: ir.Model) -> int:
    """Turn int8 weights that meet uint8 activations into uint8, in place; return how many products changed.

    The integers that the products compute, and so all outputs, stay the same.
    """
    changed = 0
    for graph in graphs_within(model.graph):
        for node in list(graph):
            places = WEIGHT_INPUTS.get((node.domain, node.op_type))
            if places is not None and _reencode(graph, node, *places):
                changed += 1
    return changed


def _reencode(graph: ir.Graph, node: ir.Node, data: int, weight: int, zero: int) -> bool:
    value = node.inputs[weight]
    if value is None or value.dtype != ir.DataType.INT8 or _signed(node.inputs[data]):
        return False
    shift = _constant(graph, node, "128", np.array(128, np.int32))
    point = node.inputs[zero] if len(node.inputs) > zero else None
    moved_point = (
        _constant(graph, node, "zero_point", np.array(128, np.uint8))
        if point is None
        else _moved(graph, node, point, shift, "zero_point")
    )
    if len(node.inputs) <= zero:
        node.resize_inputs(zero + 1)
    node.replace_input_with(weight, _moved(graph, node, value, shift, "weight"))
    node.replace_input_with(zero, moved_point)
    return True


def _signed(value: ir.Value | None) -> bool:
    """Signed activations have kernels that do not saturate."""
    return value is not None and value.dtype == ir.DataType.INT8


def _moved(graph: ir.Graph, node: ir.Node, value: ir.Value, shift: ir.Value, what: str) -> ir.Value:
    """Return int8 `value` + 128 as uint8, computed in front of `node`."""
    wide, narrow = {"to": ir.DataType.INT32.value}, {"to": ir.DataType.UINT8.value}
    steps: tuple[tuple[str, dict[str, int]], ...] = (("Cast", wide), ("Add", {}), ("Cast", narrow))
    for k, (op_type, attributes) in enumerate(steps):
        inputs = [value, shift] if op_type == "Add" else [value]
        made = ir.node(op_type, inputs, attributes)
        made.outputs[0].name = f"{node.outputs[0].name}.unsigned_{what}_{k}"
        graph.insert_before(node, made)
        value = made.outputs[0]
    return value


def _constant(
    graph: ir.Graph, node: ir.Node, what: str, array: np.ndarray[tuple[int, ...], np.dtype[np.int32 | np.uint8]]
) -> ir.Value:
    made = ir.node("Constant", [], {"value": ir.tensor(array)})
    made.outputs[0].name = f"{node.outputs[0].name}.unsigned_{what}"
    graph.insert_before(node, made)
    return made.outputs[0]
