"""Small networks for the tests of `compress`, data for them, and how far two programs are apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from tests.zoo.net import Net

from cipm_ir.runtime.session import run
from cipm_ir.symmetry.program import Program

Array = NDArray[Any]
Feeds = dict[str, Array]


def program(net: Net) -> Program:
    """Program of a finished net."""
    return Program.of(ir.from_proto(net.model()))


def images(count: int, channels: int = 3, size: int = 6, seed: int = 0) -> Feeds:
    """Smooth images: neighbours are alike, as in real ones."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((count, channels, size // 2, size // 2)).repeat(2, axis=2).repeat(2, axis=3)
    return {"x": (coarse + 0.3 * rng.standard_normal((count, channels, size, size))).astype(np.float32)}


def rows(count: int, width: int = 6, seed: int = 0) -> Feeds:
    """Normal rows."""
    return {"x": np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)}


def array_of(made: Program, name: str) -> Array:
    """A parameter's values."""
    tensor = made.model.graph.initializers[name].const_value
    assert tensor is not None
    return np.array(tensor.numpy())


def values(made: Program, data: Feeds, *names: str) -> list[Array]:
    """Inner values of a program; without names its outputs."""
    wanted = list(names) or [v.name or "" for v in made.model.graph.outputs]
    found = run(made.model, data, wanted)
    return [np.asarray(found[name], np.float64) for name in wanted]


def names_in(node: ir.Node) -> list[str]:
    """Names of what a node reads."""
    return [v.name or "" for v in node.inputs if v is not None]


def gap(a: Array, b: Array) -> float:
    """Mean squared difference, relative to the variance of ``a``."""
    return float(np.square(a - b).mean() / a.var())


def furthest(a: list[Array], b: list[Array]) -> float:
    """Largest difference, in units of the largest output."""
    return float(max(np.abs(x - y).max() / np.abs(x).max() for x, y in zip(a, b, strict=True)))


def two_convs(batch: int | str = "N", hidden: int = 10) -> Net:
    """Conv, relu, conv with a bias: the weight of the second is ``w_5``, its bias ``b_6``."""
    net = Net("two_convs")
    h = net.relu(net.conv(net.image(3, 6, batch), 3, hidden))
    net.output(net.conv(h, hidden, 4), [batch, 4, 6, 6])
    return net


def mlp(batch: int | str = "N", widths: tuple[int, ...] = (12, 10), name: str = "mlp") -> Net:
    """Gemm and relu twice, then three logits."""
    net = Net(name)
    x, width = net.input("x", [batch, 6]), 6
    for wide in widths:
        x, width = net.relu(net.gemm(x, width, wide)), wide
    net.output(net.gemm(x, width, 3), [batch, 3])
    return net


def residual(blocks: int = 3, width: int = 8, hidden: int = 16, outputs: int = 3) -> Net:
    """A stream that several blocks write to, each Conv, relu, Conv; then pooled and classified."""
    net = Net("residual")
    stream = net.relu(net.conv(net.image(3, 6), 3, width))
    for _ in range(blocks):
        inner = net.relu(net.conv(stream, width, hidden))
        stream = net.relu(net.op("Add", stream, net.conv(inner, hidden, width)))
    pooled = net.op("Flatten", net.op("GlobalAveragePool", stream))
    net.output(net.gemm(pooled, width, outputs), ["N", outputs])
    return net
