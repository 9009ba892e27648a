"""Multi-layer perceptrons: one per activation, and the ways in which exporters write a linear layer."""

from __future__ import annotations

import numpy as np
from onnx import helper
from tests.zoo.net import INT64, Net
from tests.zoo.registry import synthetic

PLAIN = (
    "Relu",
    "LeakyRelu",
    "Tanh",
    "Sigmoid",
    "Gelu",
    "Elu",
    "Selu",
    "Softplus",
    "HardSwish",
    "Identity",
    "Abs",
    "Erf",
    "Softsign",
    "Mish",
    "Sin",
    "Cos",
    "HardSigmoid",
    "Neg",
)


def activate(net: Net, x: str, op: str, width: int) -> str:
    """Apply a named activation; "PRelu" gets one slope per unit, "Clip06" and "Clip11" constant bounds."""
    if op == "PRelu":
        return net.op("PRelu", x, net.positive((width,), "slope"))
    if op == "Clip06":
        return net.op("Clip", x, net.const(0.0), net.const(6.0))
    if op == "Clip11":
        return net.op("Clip", x, net.const(-1.0), net.const(1.0))
    if op == "Silu":
        return net.op("Mul", x, net.op("Sigmoid", x))
    if op == "Square":
        return net.op("Mul", x, x)
    return net.op(op, x)


def perceptron(net: Net, op: str = "Relu") -> None:
    """5 -> 8 -> 6 -> 3, activation after both hidden layers."""
    x = net.input("x", ["N", 5])
    h = activate(net, net.gemm(x, 5, 8), op, 8)
    h = activate(net, net.linear(h, 8, 6), op, 6)
    net.output(net.gemm(h, 6, 3), ["N", 3])


def _register_perceptrons() -> None:
    for op in (*PLAIN, "PRelu", "Clip06", "Clip11", "Silu", "Square"):

        def write(net: Net, op: str = op) -> None:
            perceptron(net, op)

        # 8 + 6 hidden units: an elementwise activation never ties or pins
        synthetic(14, "mlp", name=f"mlp_{op.lower()}")(write)
    for dtype in ("float64", "float16"):
        # 8 + 6, the element type is no matter
        synthetic(14, "mlp", dtype, name=f"mlp_{dtype}", dtype=dtype)(perceptron)


_register_perceptrons()


@synthetic(8, "mlp", name="mlp_transposed_weight")  # 8 hidden; a weight may reach MatMul through Transpose
def transposed_weight(net: Net) -> None:
    x = net.input("x", ["N", 5])
    h = net.relu(net.op("MatMul", x, net.op("Transpose", net.weight((8, 5), 5), perm=[1, 0])))
    net.output(net.gemm(h, 8, 3, trans=0), ["N", 3])


@synthetic(8, "mlp", name="mlp_weight_norm")  # 8 hidden; v, its row norms and g share the row axis
def weight_norm(net: Net) -> None:
    x = net.input("x", ["N", 5])
    v = net.weight((8, 5), 5)
    unit = net.op("Div", v, net.op("ReduceL2", v, net.const([1]), keepdims=1))
    w = net.op("Mul", unit, net.positive((8, 1), "g"))
    h = net.relu(net.op("Gemm", x, w, net.bias(8), transB=1))
    net.output(net.gemm(h, 8, 3), ["N", 3])


@synthetic(8, "mlp")  # 8 hidden; uniform weights behave like broadcast axes, the bias carries the labels
def constant_of_shape_weights(net: Net) -> None:
    x = net.input("x", ["N", 5])
    value = helper.make_tensor("value", net.elem, [1], [0.2])
    h = net.relu(
        net.op("Add", net.op("MatMul", x, net.op("ConstantOfShape", net.const([5, 8]), value=value)), net.bias(8))
    )
    net.output(net.gemm(h, 8, 3), ["N", 3])


@synthetic(21, "mlp")  # 3 layers of 7: one zero vector stored once is three biases, forked per use
def shared_zero_bias(net: Net) -> None:
    x = net.input("x", ["N", 5])
    zero = net.const(np.zeros(7), "zero")
    h, n_in = x, 5
    for _ in range(3):
        h = net.op("Tanh", net.op("Add", net.op("MatMul", h, net.weight((n_in, 7), n_in)), zero))
        n_in = 7
    net.output(net.gemm(h, 7, 3), ["N", 3])


@synthetic(8, "mlp")  # 8: one weight on two inputs, the two branches meet in Sub
def siamese(net: Net) -> None:
    w, b = net.weight((5, 8), 5), net.bias(8)
    left, right = (
        net.relu(net.op("Add", net.op("MatMul", net.input(name, ["N", 5]), w), b)) for name in ("left", "right")
    )
    net.output(net.gemm(net.op("Abs", net.op("Sub", left, right)), 8, 3), ["N", 3])


# 10 columns of the embedding (the stream) + 8 inner; the 11 rows are pinned
@synthetic(18, "mlp", ranges={"ids": 11})
def tied_embedding(net: Net) -> None:
    ids = net.input("ids", ["N", "T"], INT64)
    table = net.weight((11, 10), 10, "embedding")
    stream = net.op("Gather", table, ids, axis=0)
    inner = net.op("Gelu", net.linear(stream, 10, 8))
    stream = net.op("Add", stream, net.linear(inner, 8, 10))
    normed = net.op("LayerNormalization", stream, net.positive((10,)), net.bias(10), axis=-1)
    net.output(net.op("MatMul", normed, net.op("Transpose", table, perm=[1, 0])), ["N", "T", 11])


@synthetic(15, "mlp")  # 8 + 7, contracted by name
def einsum_layers(net: Net) -> None:
    x = net.input("x", ["N", 5])
    h = net.relu(net.op("Einsum", x, net.weight((5, 8), 5), equation="bi,ih->bh"))
    h = net.relu(net.op("Einsum", net.weight((7, 8), 8), h, equation="kh, bh -> bk"))
    net.output(net.op("Einsum", h, net.weight((7, 3), 7), equation="bh,ho"), ["N", 3])


@synthetic(8, "mlp")  # 8: scalar constants in Add, Mul, Sub, Div do not touch permutations
def scalar_arithmetic(net: Net) -> None:
    x = net.input("x", ["N", 5])
    h = net.relu(net.gemm(x, 5, 8))
    h = net.op("Add", net.op("Mul", h, net.const(2.0)), net.const(1.0))
    h = net.op("Div", net.op("Sub", net.const(3.0), h), net.const([1.5]))
    net.output(net.gemm(h, 8, 3), ["N", 3])


@synthetic(8, "mlp")  # 8: Softmax over the hidden axis passes permutations
def softmax_hidden(net: Net) -> None:
    h = net.op("Softmax", net.gemm(net.input("x", ["N", 5]), 5, 8), axis=-1)
    net.output(net.gemm(h, 8, 3), ["N", 3])


@synthetic(8, "mlp")  # 8: sqrt(|h|) + h^2 + h^p with one exponent per unit
def pow_sqrt(net: Net) -> None:
    h = net.gemm(net.input("x", ["N", 5]), 5, 8)
    root = net.op("Sqrt", net.op("Abs", h))
    powers = net.op("Pow", root, net.positive((8,), "exponent"))
    total = net.op("Sum", root, net.op("Pow", h, net.const(2.0)), powers)
    net.output(net.gemm(total, 8, 3), ["N", 3])


@synthetic(6, "mlp", "pins")  # only the second layer's 6: the first hidden layer is itself a graph output
def hidden_output(net: Net) -> None:
    h = net.relu(net.gemm(net.input("x", ["N", 5]), 5, 8))
    deep = net.relu(net.gemm(h, 8, 6))
    net.output(h, ["N", 8])
    net.output(net.gemm(deep, 6, 3), ["N", 3])


@synthetic(6, "mlp", "pins")  # only the second layer's 6: the first meets the graph input in Mul
def gated_by_input(net: Net) -> None:
    x = net.input("x", ["N", 8])
    h = net.op("Mul", net.relu(net.gemm(x, 8, 8)), x)
    net.output(net.gemm(net.relu(net.gemm(h, 8, 6)), 6, 3), ["N", 3])
