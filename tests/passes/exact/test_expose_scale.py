"""Folding of constants that multiply a product unit by unit."""

from __future__ import annotations

import numpy as np
import pytest
from tests.models.expose_nets import array_of, difference, expose, operators, program
from tests.zoo.net import Net

ONLY = "shared=none"


def finished(net: Net, x: str, n: int = 6) -> Net:
    net.output(net.linear(net.relu(x), n, 3), ["N", 3])
    return net


@pytest.mark.parametrize("form", ["linear", "bare", "gemm", "gemm without bias", "first"])
def test_matrices(form: str) -> None:
    net = Net(form)
    x, scale = net.input("x", ["N", 4]), net.const(net.normal((6,), 1.0), "scale")
    if form == "gemm":
        y = net.gemm(x, 4, 6)
    elif form == "gemm without bias":
        y = net.op("Gemm", x, net.weight((4, 6), 4), alpha=0.5)
    elif form == "bare":
        y = net.op("MatMul", x, net.weight((4, 6), 4))
    else:
        y = net.linear(x, 4, 6)
    given = (scale, y) if form == "first" else (y, scale)
    after, step = expose(program(finished(net, net.op("Mul", *given))), ONLY)
    assert step.metrics["layer_scales"] == 1 and "Mul" not in operators(after)


@pytest.mark.parametrize("group", [1, 2])
def test_convolutions(group: int) -> None:
    net = Net(f"group {group}")
    y = net.conv(net.image(4, 4), 4, 6, group=group)
    net.classify(net.relu(net.op("Mul", y, net.const(net.normal((6, 1, 1), 1.0), "scale"))), 6)
    after, step = expose(program(net), ONLY)
    assert step.metrics["layer_scales"] == 1 and "Mul" not in operators(after)


def refused(net: Net) -> str:
    _, step = expose(program(net), ONLY)
    assert not step.changed
    return step.summary


def test_something_else_reads_it() -> None:
    net = Net("read")
    y = net.linear(net.input("x", ["N", 4]), 4, 6)
    scaled = net.op("Mul", y, net.const(net.normal((6,), 1.0)))
    assert refused(finished(net, net.op("Add", y, scaled))) == "nothing to expose"


def test_a_scale_along_another_axis() -> None:
    net = Net("width")
    y = net.conv(net.image(4, 6), 4, 6)
    net.classify(net.op("Mul", y, net.const(net.normal((6,), 1.0))), 6)
    assert refused(net) == "nothing to expose"


def test_shared_weights() -> None:
    net = Net("shared")
    x, weight = net.input("x", ["N", 6]), net.weight((6, 6), 6)
    for _ in range(2):
        x = net.relu(net.op("Mul", net.op("MatMul", x, weight), net.const(net.normal((6,), 1.0))))
    assert "is read in several places" in refused(finished(net, x))


def test_a_bias_that_is_left_out_is_caught() -> None:
    """Negative control: the scale must reach the bias too."""
    net = Net("control")
    y = net.linear(net.input("x", ["N", 4]), 4, 6)
    before = program(finished(net, net.op("Mul", y, net.const(np.full(6, 2.0), "scale"))))
    after, _ = expose(before, ONLY)
    (bias,) = [name for name in after.model.graph.initializers if name[:2] == "b_" and array_of(after, name).size == 6]
    assert difference(before, after.refit({bias: array_of(before, bias)})) > 1e-2
