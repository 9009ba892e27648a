"""Cases for onnxruntime's operators on few bits (domain com.microsoft)."""

from __future__ import annotations

from typing import Any

import numpy as np
from tests.ops.cases_runtime import RUNTIME, own
from tests.ops.sample import Sample, case

PLAIN, POSITIVE = "S(6)", "R>0 wr S(6)"
SIGN = {"c:sign": "no runtime expects a negative scale"}


def numbers(net: Sample, scale: float = 0.02, zero: int = 120) -> list[str]:
    """Scale and zero point of a tensor of unsigned bytes."""
    return [net.const(np.float32(scale)), net.const(np.uint8(zero))]


def bytes_of(net: Sample, value: str) -> list[str]:
    """A value in unsigned bytes, with its scale and zero point."""
    given = numbers(net)
    return [net.op("QuantizeLinear", value, *given), *given]


def read(net: Sample, value: str, *given: str, n: int = 6, units: str = "h", image: bool = False) -> None:
    """Read bytes as numbers."""
    net.read(net.op("DequantizeLinear", value, *given), n, units, image=image)


for _name in ("QLinearAdd", "QLinearMul"):

    @case(f"{RUNTIME}::{_name}", PLAIN, name="two_branches")
    def binary(net: Sample, op: str = _name) -> None:
        out = numbers(net)
        read(net, own(net, op, *bytes_of(net, net.sequence()), *bytes_of(net, net.sequence()), *out), *out)


@case(f"{RUNTIME}::QLinearAdd", PLAIN)
def a_constant_vector(net: Sample) -> None:
    out, b = numbers(net), net.const(net.rng.integers(0, 250, 6).astype(np.uint8))
    net.made("h", b, 0)
    read(net, own(net, "QLinearAdd", *bytes_of(net, net.sequence()), b, *numbers(net), *out), *out)


for _name, _attributes in (("QLinearLeakyRelu", {"alpha": 0.1}), ("QLinearSigmoid", {})):

    @case(f"{RUNTIME}::{_name}", PLAIN, name="vector")
    def unary(net: Sample, op: str = _name, attributes: dict[str, Any] = _attributes) -> None:
        out = numbers(net)
        read(net, own(net, op, *bytes_of(net, net.vector()), *out, **attributes), *out)


for _axis, _opset in ((-1, 13), (1, 12)):

    @case(f"{RUNTIME}::QLinearSoftmax", PLAIN, name=f"opset_{_opset}")
    def softmax(net: Sample, axis: int = _axis, opset: int = _opset) -> None:
        out = numbers(net, 1 / 256, 0)
        read(net, own(net, "QLinearSoftmax", *bytes_of(net, net.sequence()), *out, axis=axis, opset=opset), *out)


@case(f"{RUNTIME}::QLinearConcat", PLAIN, PLAIN)
def along_units(net: Sample) -> None:
    out = numbers(net)
    y = own(net, "QLinearConcat", *out, *bytes_of(net, net.vector()), *bytes_of(net, net.vector(units="k")), axis=1)
    read(net, y, *out, n=12, units="both")


@case(f"{RUNTIME}::QLinearConcat", PLAIN)
def along_positions(net: Sample) -> None:
    out = numbers(net)
    read(
        net,
        own(net, "QLinearConcat", *out, *bytes_of(net, net.sequence()), *bytes_of(net, net.sequence()), axis=1),
        *out,
    )


@case(f"{RUNTIME}::QLinearAveragePool", PLAIN)
def averages(net: Sample) -> None:
    out = numbers(net)
    pool: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [2, 2]}
    read(net, own(net, "QLinearAveragePool", *bytes_of(net, net.picture()), *out, **pool), *out, image=True)


@case(f"{RUNTIME}::QLinearGlobalAveragePool", PLAIN)
def one_average(net: Sample) -> None:
    out = numbers(net)
    read(net, own(net, "QLinearGlobalAveragePool", *bytes_of(net, net.picture()), *out), *out, image=True)


@case(f"{RUNTIME}::QLinearGlobalAveragePool", PLAIN)
def channels_last(net: Sample) -> None:
    out, turned = numbers(net), net.op("Transpose", net.picture(), perm=[0, 2, 3, 1])
    read(net, own(net, "QLinearGlobalAveragePool", *bytes_of(net, turned), *out, channels_last=1), *out)


def quantized_weight(net: Sample, shape: tuple[int, ...], axis: int, units: str) -> list[str]:
    """Signed bytes with a scale and zero point per index of an axis, where the units are made."""
    w = net.const(net.rng.integers(-120, 120, shape).astype(np.int8))
    scale = net.const(net.rng.uniform(0.005, 0.02, shape[axis]).astype(np.float32))
    zero = net.const(np.zeros(shape[axis], np.int8))
    net.made(units, w, axis)
    net.made(units, scale, 0)
    return [w, scale, zero]


@case(f"{RUNTIME}::QLinearConv", PLAIN, PLAIN)
def convolution(net: Sample) -> None:
    out = numbers(net, 0.05)
    y = own(net, "QLinearConv", *bytes_of(net, net.picture()), *quantized_weight(net, (6, 6, 3, 3), 0, "c"), *out)
    read(net, y, *out, units="c", image=True)


@case(f"{RUNTIME}::QLinearConv", PLAIN, PLAIN)
def convolution_of_channels_last(net: Sample) -> None:
    out, turned = numbers(net, 0.05), net.op("Transpose", net.picture(), perm=[0, 2, 3, 1])
    w = quantized_weight(net, (6, 6, 3, 3), 0, "c")
    bias = net.const(net.rng.integers(-900, 900, 6).astype(np.int32))
    read(net, own(net, "QLinearConv", *bytes_of(net, turned), *w, *out, bias, channels_last=1), *out, units="c")


@case(f"{RUNTIME}::DynamicQuantizeMatMul", PLAIN, POSITIVE, coarse=SIGN)
def with_a_bias(net: Sample) -> None:
    b = net.bias(6)
    net.made("c", b, 0)
    net.read(own(net, "DynamicQuantizeMatMul", net.sequence(), *quantized_weight(net, (6, 6), 1, "c"), b), units="c")


@case(f"{RUNTIME}::MatMulIntegerToFloat", PLAIN, POSITIVE, coarse=SIGN)
def of_integers(net: Sample) -> None:
    x, sx, zx = bytes_of(net, net.sequence())
    w, s, z = quantized_weight(net, (6, 6), 1, "c")
    net.read(own(net, "MatMulIntegerToFloat", x, w, sx, s, zx, z), units="c")


@case(f"{RUNTIME}::QGemm", PLAIN, PLAIN, coarse=SIGN)
def of_rows(net: Sample) -> None:
    out = numbers(net, 0.4)
    w = quantized_weight(net, (6, 6), 0, "c")
    bias = net.const(net.rng.integers(-900, 900, 6).astype(np.int32))
    read(net, own(net, "QGemm", *bytes_of(net, net.vector()), *w, bias, *out, transB=1, alpha=1.0), *out, units="c")


def _packed(name: str, flat: bool, zeros: bool) -> None:
    @case(f"{RUNTIME}::MatMulNBits", "S(8)", name=name)
    def write(net: Sample) -> None:
        w = net.const(net.rng.integers(0, 256, (8, 2, 8)).astype(np.uint8))  # 8 rows of two blocks of 16
        scale = net.positive((16,) if flat else (8, 2))
        given = [w, scale]
        if zeros:
            given.append(net.const(net.rng.integers(0, 256, (8,) if flat else (8, 1)).astype(np.uint8)))
        net.made("c", w, 0)
        net.read(own(net, "MatMulNBits", net.sequence(32), *given, K=32, N=8, bits=4, block_size=16), 8, "c")


_packed("flat", True, False)
_packed("flat_with_zero_points", True, True)
_packed("table_with_zero_points", False, True)


@case(f"{RUNTIME}::QAttention", PLAIN, *("S(3)",) * 4, "blocks S(2)")
def attention(net: Sample) -> None:
    x, sx, zx = bytes_of(net, net.sequence())
    w = net.const(net.rng.integers(-120, 120, (6, 18)).astype(np.int8))
    bias, scale, zero = net.bias(18), net.const(np.float32(0.02)), net.const(np.int8(0))
    net.read(own(net, "QAttention", x, w, bias, sx, scale, "", zx, zero, num_heads=2), 6, "v")


def quantized_lstm(net: Sample, directions: int, **optional: tuple[int, ...]) -> None:
    w = net.const(net.rng.integers(0, 250, (directions, 6, 20)).astype(np.uint8))
    r = net.const(net.rng.integers(0, 250, (directions, 5, 20)).astype(np.uint8))
    b = net.const(net.normal((directions, 40), 0.3))
    scale = net.const(np.linspace(0.01, 0.02, directions, dtype=np.float32))
    zero = net.const(np.linspace(120, 110, directions).astype(np.uint8))
    given = [net.const(net.normal(optional[k], 0.3)) if k in optional else "" for k in ("h", "c", "p")]
    inputs = [net.sequence(), w, r, b, "", *given, scale, zero, scale, zero]
    direction = "bidirectional" if directions == 2 else "forward"
    made = net.multi("DynamicQuantizeLSTM", inputs, 3, domain=RUNTIME, hidden_size=5, direction=direction)[0]
    if directions == 1:
        net.read(made, 5, "u")
    else:  # (T, 2, N, 5): the consumer has columns of its own for each direction
        rows = net.op("Transpose", made, perm=[0, 2, 1, 3])
        net.read(net.op("Reshape", rows, net.const(np.array([0, 0, 10], np.int64))), 10, "u")


FIRST = {"h": (2, 5, 5), "c": (2, 5, 5)}
for label, spaces, drawn in (
    ("lstm", ["S(5)"], lambda net: quantized_lstm(net, 1)),
    ("directions_apart", ["S(5)", "S(5)"], lambda net: quantized_lstm(net, 2)),
    ("directions_with_states_and_peepholes", ["S(5)", "S(5)"], lambda net: quantized_lstm(net, 2, **FIRST, p=(2, 15))),
):
    case(f"{RUNTIME}::DynamicQuantizeLSTM", PLAIN, *spaces, name=label)(drawn)
