"""The scale system finds every scale symmetry that numbers find, and no other: the oracle is `scale_rank`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tests.oracles.scale_rank import Comparison, compare, null_dimension, our_directions, stacked, twin
from tests.zoo.net import Net

from cipm_ir.ops import registry
from cipm_ir.ops.context import OpContext
from cipm_ir.ops.elementwise import homogeneous, pointwise
from cipm_ir.symmetry.program import Program

Write = Callable[[Net], None]


def net_of(name: str, write: Write, opset: int = 20) -> onnx.ModelProto:
    net = Net(f"rank_{name}", opset=opset, dtype="float64")
    write(net)
    return net.model()


def free_directions(model: onnx.ModelProto) -> int:
    return sum(s.group.scales * s.size for s in Program.of(ir.from_proto(model)).spaces)


# ---------------------------------------------------------------- graphs
def perceptron(act: Callable[[Net, str, int], str]) -> Write:
    """4 -> 5 -> 4 -> 2, an activation behind both hidden layers."""

    def write(net: Net) -> None:
        h = act(net, net.gemm(net.input("x", ["N", 4]), 4, 5), 5)
        h = act(net, net.linear(h, 5, 4), 4)
        net.output(net.gemm(h, 4, 2), ["N", 2])

    return write


def plain(op: str) -> Write:
    return perceptron(lambda net, x, _width: net.op(op, x))


def leaky(net: Net) -> None:
    h = net.op("LeakyRelu", net.gemm(net.input("x", ["N", 4]), 4, 5), alpha=0.1)
    h = net.op("PRelu", net.gemm(h, 5, 4), net.positive((4,), "slope"))
    net.output(net.gemm(h, 4, 2), ["N", 2])


def pooled_convs(net: Net) -> None:
    h = net.op("AveragePool", net.relu(net.conv(net.image(2, 6), 2, 3, k=2)), kernel_shape=[2, 2], strides=[2, 2])
    h = net.relu(net.conv(h, 3, 4, k=2))
    pooled = net.op("Flatten", net.op("GlobalAveragePool", h))
    net.output(net.gemm(pooled, 4, 2), ["N", 2])


def residual(net: Net) -> None:
    s = net.relu(net.gemm(net.input("x", ["N", 4]), 4, 5))
    for inner in (3, 4):
        s = net.relu(net.op("Add", s, net.gemm(net.relu(net.gemm(s, 5, inner)), inner, 5)))
    net.output(net.gemm(s, 5, 2), ["N", 2])


def depthwise(net: Net) -> None:
    h = net.relu(net.conv(net.image(2, 5), 2, 4, k=1))
    h = net.relu(net.conv(h, 4, 4, k=2, group=4))
    h = net.relu(net.conv(h, 4, 3, k=1))
    net.output(net.gemm(net.op("Flatten", net.op("GlobalAveragePool", h)), 3, 2), ["N", 2])


def gated(net: Net) -> None:
    x = net.input("x", ["N", 4])
    up, gate, silent = net.gemm(x, 4, 5), net.gemm(x, 4, 5), net.op("Sigmoid", net.gemm(x, 4, 5))
    h = net.op("Mul", net.op("Mul", up, net.relu(gate)), silent)
    net.output(net.gemm(h, 5, 2), ["N", 2])


def quotient(net: Net) -> None:
    x = net.input("x", ["N", 4])
    top, bottom = net.gemm(x, 4, 4), net.op("Add", net.op("Abs", net.gemm(x, 4, 4)), net.positive((4,)))
    h = net.op("Div", top, bottom)
    net.output(net.gemm(h, 4, 2), ["N", 2])


def concatenated(net: Net) -> None:
    x = net.input("x", ["N", 4])
    both = net.op("Concat", net.relu(net.gemm(x, 4, 3)), net.relu(net.gemm(x, 4, 4)), axis=1)
    one, other = net.relu(net.gemm(both, 7, 3)), net.op("Tanh", net.gemm(both, 7, 3))
    net.output(net.op("Add", net.gemm(one, 3, 2), net.gemm(other, 3, 2)), ["N", 2])


def attention(net: Net, *, key_bias: bool = False) -> None:
    """Two heads of 2: a direction per unit of Q-K and of V-O; a softmax does not feel a bias of the keys."""
    x = net.input("x", ["N", "T", 3])
    parts = []
    for role in "qkv":
        h = net.op("MatMul", x, net.weight((3, 4), 3))
        h = net.op("Add", h, net.bias(4)) if role != "k" or key_bias else h
        parts.append(net.op("Transpose", net.op("Reshape", h, net.const([0, 0, 2, 2])), perm=[0, 2, 1, 3]))
    scores = net.op("MatMul", parts[0], net.op("Transpose", parts[1], perm=[0, 1, 3, 2]))
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), parts[2])
    merged = net.op("Reshape", net.op("Transpose", mixed, perm=[0, 2, 1, 3]), net.const([0, 0, 4]))
    net.output(net.linear(merged, 4, 2), ["N", "T", 2])


def attention_fused(net: Net) -> None:
    """The same with queries, keys and values from one matrix."""
    x = net.input("x", ["N", "T", 3])
    joint = net.op("Reshape", net.op("MatMul", x, net.weight((3, 12), 3)), net.const([0, 0, 3, 2, 2]))
    joint = net.op("Transpose", joint, perm=[2, 0, 3, 1, 4])
    q, k, v = (net.op("Gather", joint, net.const(i), axis=0) for i in range(3))
    scores = net.op("Softmax", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    mixed = net.op("Transpose", net.op("MatMul", scores, v), perm=[0, 2, 1, 3])
    net.output(net.linear(net.op("Reshape", mixed, net.const([0, 0, 4])), 4, 2), ["N", "T", 2])


def gated_fused(net: Net) -> None:
    """Gate and gated from one matrix; only the gated half may be scaled."""
    up, gate = net.multi("Split", [net.gemm(net.input("x", ["N", 4]), 4, 8)], 2, axis=1, num_outputs=2)
    net.output(net.gemm(net.op("Mul", up, net.op("Sigmoid", gate)), 4, 2), ["N", 2])


def gated_by_input(net: Net) -> None:
    """Units that meet the inputs may not be exchanged, but scaled they could be."""
    x = net.input("x", ["N", 4])
    net.output(net.gemm(net.op("Mul", net.relu(net.gemm(x, 4, 4)), x), 4, 2), ["N", 2])


def batch_norm(net: Net) -> None:
    """Input and output of a normalization each have a direction; the last one is followed by no activation."""
    h = net.gemm(net.input("x", ["N", 4]), 4, 4)
    h = net.relu(net.batch_norm(h, 4))
    h = net.batch_norm(net.gemm(h, 4, 3), 3)
    net.output(net.gemm(h, 3, 2), ["N", 2])


def batch_norm_residual(net: Net) -> None:
    """A stream that enters two normalizations: it may be scaled before each."""
    s = net.gemm(net.input("x", ["N", 4]), 4, 4)
    for _ in range(2):
        s = net.op("Add", s, net.gemm(net.relu(net.batch_norm(s, 4)), 4, 4))
    net.output(net.gemm(s, 4, 2), ["N", 2])


def layer_norm(net: Net, epsilon: float = 0.1) -> None:
    h = net.gemm(net.input("x", ["N", 4]), 4, 5)
    h = net.op("LayerNormalization", h, net.positive((5,)), net.bias(5), axis=-1, epsilon=epsilon)
    net.output(net.gemm(net.relu(net.gemm(h, 5, 3)), 3, 2), ["N", 2])


def rms_norm(net: Net) -> None:
    s = net.gemm(net.input("x", ["N", 4]), 4, 5)
    for _ in range(2):
        normed = net.op("RMSNormalization", s, net.positive((5,)), axis=-1, epsilon=0.1)
        s = net.op("Add", s, net.gemm(net.relu(net.gemm(normed, 5, 3)), 3, 5))
    net.output(net.gemm(s, 5, 2), ["N", 2])


def tied(net: Net) -> None:
    """One matrix used twice in a row ties the scales of three layers."""
    w, b = net.weight((5, 5), 5), net.bias(5)
    h = net.relu(net.gemm(net.input("x", ["N", 4]), 4, 5))
    for _ in range(2):
        h = net.relu(net.op("MatMul", h, w))
    net.output(net.gemm(net.op("Add", h, b), 5, 2), ["N", 2])


def extrema(net: Net) -> None:
    x = net.input("x", ["N", 4])
    low = net.op("Min", net.gemm(x, 4, 4), net.gemm(x, 4, 4), net.bias(4))
    high = net.op("Max", low, net.gemm(x, 4, 4))
    h = net.op("Max", net.gemm(high, 4, 3), net.const(0.0))
    net.output(net.gemm(h, 3, 2), ["N", 2])


def maxout(net: Net) -> None:
    x = net.input("x", ["N", 4])
    pieces = net.multi("Split", [net.gemm(x, 4, 8)], 2, axis=1, num_outputs=2)
    net.output(net.gemm(net.op("Max", *pieces), 4, 2), ["N", 2])


def roots(net: Net) -> None:
    """sqrt(h^2 + p) takes a scale of h where p takes its square; the quotient takes none."""
    h = net.gemm(net.input("x", ["N", 4]), 4, 4)
    root = net.op("Sqrt", net.op("Add", net.op("Pow", h, net.const(2.0)), net.positive((4,))))
    inverse = net.op("Reciprocal", net.op("Add", root, net.positive((4,))))
    first, second = net.gemm(net.op("Mul", h, inverse), 4, 3), net.gemm(root, 4, 3)
    net.output(net.op("Add", net.gemm(net.relu(first), 3, 2), net.gemm(net.relu(second), 3, 2)), ["N", 2])


def powers(net: Net) -> None:
    x = net.input("x", ["N", 4])
    h = net.gemm(x, 4, 4)
    cubed, square = net.op("Pow", h, net.const(3.0)), net.op("Mul", h, h)
    h = net.op("Add", net.op("Mul", cubed, net.positive((4,))), net.op("Mul", square, net.positive((4,))))
    net.output(net.gemm(h, 4, 2), ["N", 2])


def clipped(net: Net) -> None:
    h = net.op("Clip", net.gemm(net.input("x", ["N", 4]), 4, 4), net.const(0.0))
    h = net.op("Clip", net.gemm(h, 4, 4), net.const(-0.5), net.const(0.5))
    net.output(net.gemm(h, 4, 2), ["N", 2])


def grouped(net: Net) -> None:
    h = net.relu(net.conv(net.image(2, 4), 2, 4, k=1))
    h = net.relu(net.conv(h, 4, 6, k=2, group=2))
    net.output(net.gemm(net.op("Flatten", net.op("GlobalAveragePool", h)), 6, 2), ["N", 2])


GRAPHS: dict[str, tuple[Write, int]] = {
    "relu": (plain("Relu"), 9),
    "leaky": (leaky, 9),
    "pooled_convs": (pooled_convs, 7),
    "residual": (residual, 5 + 3 + 4),
    "depthwise": (depthwise, 4 + 4 + 3),
    "gated": (gated, 5 + 5),
    "quotient": (quotient, 4 + 4),
    "concatenated": (concatenated, 3 + 4 + 3),
    "attention": (attention, 4 + 4),
    "attention_key_bias": (partial(attention, key_bias=True), 4 + 4),
    "attention_fused": (attention_fused, 4),
    "gated_fused": (gated_fused, 0),
    "gated_by_input": (gated_by_input, 0),
    "batch_norm": (batch_norm, 2 * 4 + 2 * 3),
    "batch_norm_residual": (batch_norm_residual, 3 * 4),
    "layer_norm": (layer_norm, 5 + 3),
    "layer_norm_no_epsilon": (partial(layer_norm, epsilon=0.0), 5 + 3),
    "square": (perceptron(lambda net, x, _width: net.op("Mul", x, x)), 9),
    "tied": (tied, 5),
    "extrema": (extrema, 4 + 3),
    "maxout": (maxout, 4),
    "powers": (powers, 8),
    "clipped": (clipped, 4),
    "grouped": (grouped, 4 + 6),
    "roots": (roots, 4 + 3 + 3),
    "tanh": (plain("Tanh"), 0),
    "rms_norm": (rms_norm, 2 * (5 + 3)),
    "sigmoid": (plain("Sigmoid"), 0),
}
"""Each with the number of directions that there are, counted by hand."""
OPSETS = {"rms_norm": 23}


BEYOND: dict[str, tuple[int, str]] = {
    "batch_norm": (4 + 3, "scale and deviation of a batch norm by one factor: nothing outside the norm moves"),
    "batch_norm_residual": (2 * 4, "the same"),
    "tied": (1, "the whole matrix by one number, which the last layer undoes twice"),
    "attention_key_bias": (4, "a softmax ignores what all keys share, so this bias has no effect at all"),
    "attention_fused": (4, "queries and keys are units of one axis of one matrix, which shares one scale"),
    "gated_fused": (4, "the same for the two halves"),
    "gated_by_input": (4, "what may not be exchanged is in no space, so it is not scaled either"),
    "layer_norm_no_epsilon": (1, "all that enters a normalization by one number"),
}
"""Directions that numbers find and spaces do not hold: how many, and what they are. None of them is unsound to miss."""


@pytest.mark.parametrize("name", GRAPHS)
def test_as_many_directions_as_the_jacobian_says(name: str) -> None:
    write, expected = GRAPHS[name]
    model = net_of(name, write, opset=OPSETS.get(name, 20))
    found = compare(model)
    assert found.leak <= 1e-8, "a direction of ours changes an output"
    assert found.ours == found.independent == free_directions(model) == expected
    assert found.numeric == expected + BEYOND.get(name, (0, ""))[0]


def selected(net: Net) -> None:
    """A gate by comparison with zero, and a choice by comparison of two values."""
    x = net.input("x", ["N", 4])
    left, right, other, gate = (net.gemm(x, 4, 4) for _ in range(4))
    h = net.op("Where", net.op("Greater", gate, net.const(0.0)), left, net.op("Neg", right))
    h = net.op("Where", net.op("LessOrEqual", left, other), h, other)
    net.output(net.gemm(h, 4, 2), ["N", 2])


def test_comparisons_feel_no_scale_that_both_sides_share() -> None:
    """Steps have no derivative, so the Jacobian cannot count here: one direction per gate, one for all the rest."""
    model = net_of("selected", selected)
    one = twin(model, samples=200)
    assert free_directions(model) == 4 + 4
    assert np.abs(stacked(one, settings=3) @ our_directions(model, one).T).max() <= 1e-8


# ---------------------------------------------------------------- controls
def with_rule(
    monkeypatch: pytest.MonkeyPatch, op: str, rule: Callable[[OpContext], None], write: Write
) -> tuple[Comparison, int]:
    """The comparison while an operator has another rule, and what the right one finds."""
    model = net_of(f"control_{op}", write)
    right = free_directions(model)
    entry = registry.lookup("", op)
    assert entry is not None
    monkeypatch.setitem(registry._REGISTRY, ("", op), replace(entry, labels=rule))
    return compare(model), right


def test_a_direction_that_is_none_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    found, right = with_rule(monkeypatch, "Softplus", homogeneous, plain("Softplus"))
    assert found.ours == 9 and right == found.numeric == 0
    assert found.leak > 1e-3


def test_a_direction_that_is_not_found_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    found, right = with_rule(monkeypatch, "Relu", pointwise, plain("Relu"))
    assert found.ours == 0 and right == found.numeric == 9


def test_null_dimension_refuses_to_guess() -> None:
    assert null_dimension(np.diag([1.0, 0.5, 1e-12])) == 1
    with pytest.raises(AssertionError, match="gap"):
        null_dimension(np.diag([1.0, 0.5, 3e-9]))
    with pytest.raises(AssertionError, match="samples"):
        null_dimension(np.ones((1, 2)))


def test_our_directions_are_read_from_what_act_does() -> None:
    """One direction of a unit moves its row and its bias up, and its column down."""
    model = net_of("relu", plain("Relu"))
    one = twin(model)
    rows = our_directions(model, one)
    assert rows.shape == (9, sum(a.size for a in one.parameters.values()))
    assert set(np.round(np.unique(rows), 9)) == {-1.0, 0.0, 1.0}
    assert np.abs(stacked(one, settings=2) @ rows.T).max() < 1e-8
