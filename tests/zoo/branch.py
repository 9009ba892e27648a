"""Branches that meet: gates, differences, selections."""

from __future__ import annotations

from tests.zoo.net import BOOL, Net
from tests.zoo.registry import synthetic


def two(net: Net, width: int = 8) -> tuple[str, str]:
    """Two linear branches from the input (N, 5)."""
    x = net.input("x", ["N", 5])
    return net.gemm(x, 5, width), net.gemm(x, 5, width)


@synthetic(8, "branch")  # 8: the branches move together
def subtract_branches(net: Net) -> None:
    net.output(net.gemm(net.relu(net.op("Sub", *two(net))), 8, 3), ["N", 3])


@synthetic(8, "branch")  # 8
def divide_branches(net: Net) -> None:
    top, bottom = two(net)
    ratio = net.op("Div", top, net.op("Add", net.op("Exp", bottom), net.const(1.0)))
    net.output(net.gemm(ratio, 8, 3), ["N", 3])


@synthetic(22, "branch")  # stream 10 + 12 inner: up times silu(gate)
def gated_mlp(net: Net) -> None:
    stream = net.linear(net.input("x", ["N", "T", 5]), 5, 10)
    normed = net.op("LayerNormalization", stream, net.positive((10,)), axis=-1)
    up, gate = net.linear(normed, 10, 12), net.linear(normed, 10, 12)
    inner = net.op("Mul", up, net.op("Mul", gate, net.op("Sigmoid", gate)))
    stream = net.op("Add", stream, net.linear(inner, 12, 10))
    net.output(net.linear(stream, 10, 3), ["N", "T", 3])


@synthetic(8, "branch")  # 8: Where, Min, Max and a comparison
def select_branches(net: Net) -> None:
    left, right = two(net)
    chosen = net.op("Where", net.op("Greater", left, net.const(0.0)), left, right)
    low = net.op("Min", left, right, net.bias(8))
    high = net.op("Max", chosen, right)
    net.output(net.gemm(net.op("Sum", chosen, low, high), 8, 3), ["N", 3])


@synthetic(8, "branch")  # 8: the condition (N, 1) is an input and broadcasts
def where_input_condition(net: Net) -> None:
    condition = net.input("condition", ["N", 1], BOOL)
    net.output(net.gemm(net.op("Where", condition, *two(net)), 8, 3), ["N", 3])


@synthetic(15, "branch")  # 8 + 7: one hidden layer read by two heads that are both outputs
def two_heads(net: Net) -> None:
    h = net.relu(net.gemm(net.input("x", ["N", 5]), 5, 8))
    net.output(net.gemm(h, 8, 3), ["N", 3])
    net.output(net.gemm(net.relu(net.gemm(h, 8, 7)), 7, 2), ["N", 2])


@synthetic(7, "branch")  # 7 = one class set: conv, its BatchNorm branch and a 1x1 branch are added (RepVGG)
def repvgg_branches(net: Net) -> None:
    h = net.relu(net.conv(net.image(), 3, 7))
    h = net.op("Sum", net.conv(h, 7, 7), net.conv(h, 7, 7, k=1), net.batch_norm(h, 7))
    net.classify(net.relu(h), 7)


@synthetic(19, "branch")  # dense connections: 6 + 6 + 7, each new feature concatenated to all before
def dense_block(net: Net) -> None:
    features, width = net.conv(net.image(), 3, 6), 6
    for growth in (6, 7):
        new = net.conv(net.relu(net.batch_norm(features, width)), width, growth)
        features, width = net.op("Concat", features, new, axis=1), width + growth
    net.classify(net.relu(features), width)


@synthetic(8, "branch")  # 8: outer product over a new axis, contracted on both sides
def bilinear_gram(net: Net) -> None:
    h = net.relu(net.linear(net.input("x", ["N", 4, 5]), 5, 8))
    gram = net.op("MatMul", h, net.op("Transpose", h, perm=[0, 2, 1]))
    net.output(net.gemm(net.op("Reshape", gram, net.const([0, 16])), 16, 3), ["N", 3])
