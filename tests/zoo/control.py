"""What the analysis does not look into (subgraphs, foreign operators) and what it inlines (model-local functions)."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper
from tests.zoo.net import BOOL, Net
from tests.zoo.registry import synthetic


def start(net: Net) -> str:
    """Input (N, 5), hidden layers of 7 and 8: (N, 8)."""
    h = net.relu(net.gemm(net.input("x", ["N", 5]), 5, 7))
    return net.relu(net.gemm(h, 7, 8))


def finish(net: Net, h: str) -> None:
    """From (N, 8), a hidden layer of 6 and the output (N, 3)."""
    net.output(net.gemm(net.relu(net.gemm(h, 8, 6)), 6, 3), ["N", 3])


def info(name: str, shape: list[int | str], elem: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """Value info of a subgraph input or output."""
    return helper.make_tensor_value_info(name, elem, shape)


@synthetic(13, "control", "opaque", "pins")  # 7 + 6: the 8 units are captured by the branches
def if_capture(net: Net) -> None:
    condition = net.input("condition", [], BOOL)
    h, scale = start(net), net.positive((8,))
    then = helper.make_graph(
        [helper.make_node("Mul", [h, scale], ["then_out"])], "then", [], [info("then_out", ["N", 8])]
    )
    other = helper.make_graph(
        [helper.make_node("CumSum", [h, "axis"], ["else_out"])], "else", [], [info("else_out", ["N", 8])]
    )
    other.initializer.append(helper.make_tensor("axis", TensorProto.INT64, [], [1]))
    finish(net, net.op("If", condition, then_branch=then, else_branch=other))


@synthetic(13, "control", "opaque", "pins")  # 7 + 6: the 8 units are carried by the loop, a bias of 8 is captured
def loop_capture(net: Net) -> None:
    h, bias = start(net), net.bias(8)
    nodes = [
        helper.make_node("Identity", ["go"], ["go_out"]),
        helper.make_node("Add", ["v", bias], ["shifted"]),
        helper.make_node("Tanh", ["shifted"], ["v_out"]),
    ]
    inputs = [info("i", [], TensorProto.INT64), info("go", [], BOOL), info("v", ["N", 8])]
    body = helper.make_graph(nodes, "body", inputs, [info("go_out", [], BOOL), info("v_out", ["N", 8])])
    finish(net, net.op("Loop", net.const(3), net.const(True), h, body=body))


@synthetic(13, "control", "opaque", "pins")  # 7 + 6: the 8 units are scanned over the first axis
def scan_rows(net: Net) -> None:
    h = start(net)
    nodes = [
        helper.make_node("Add", ["state", "row"], ["state_out"]),
        helper.make_node("Tanh", ["state_out"], ["row_out"]),
    ]
    inputs, outputs = [info("state", [8]), info("row", [8])], [info("state_out", [8]), info("row_out", [8])]
    body = helper.make_graph(nodes, "body", inputs, outputs)
    first = net.op("ReduceMean", h, net.const([0]), keepdims=0)
    finish(net, net.multi("Scan", [first, h], 2, body=body, num_scan_inputs=1)[1])


@synthetic(14, "control")  # 8 + 6: each call of the function is inlined with its own parameters
def local_function_twice(net: Net) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["y"]),
    ]
    imports = [helper.make_opsetid("", 20)]
    net.functions.append(helper.make_function("zoo.local", "Dense", ["x", "w", "b"], ["y"], nodes, imports))
    net.domains["zoo.local"] = 1
    h, n_in = net.input("x", ["N", 5]), 5
    for n_out in (8, 6):
        h = net.op("Dense", h, net.weight((n_in, n_out), n_in), net.bias(n_out), domain="zoo.local")
        n_in = n_out
    net.output(net.gemm(h, 6, 3), ["N", 3])


@synthetic(13, "control", "opaque", "pins", "reference")  # 7 + 6: nothing is known about RampUp, so the 8 stay
def custom_op(net: Net) -> None:
    net.domains["zoo.custom"] = 1
    finish(net, net.op("RampUp", start(net), domain="zoo.custom"))


@synthetic(21, "control")  # 7 + 8 + 6: an operator of onnxruntime's own domain
def contrib_op(net: Net) -> None:
    net.domains["com.microsoft"] = 1
    h = net.op("BiasGelu", start(net), net.bias(8), domain="com.microsoft")
    finish(net, h)
