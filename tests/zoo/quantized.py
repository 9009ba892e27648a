"""Quantized networks: scale and zero point move with the axis they describe."""

from __future__ import annotations

import numpy as np
from tests.zoo.net import Net
from tests.zoo.registry import synthetic

IN_SCALE, HIDDEN_SCALE = 0.03, 0.02


def scalar(net: Net, value: float) -> str:
    """A float32 scalar scale."""
    return net.const(np.float32(value), "scale")


def point(net: Net, value: int) -> str:
    """A uint8 scalar zero point."""
    return net.const(np.uint8(value), "zero_point")


def signed_weight(net: Net, shape: tuple[int, ...], fan_in: int, axis: int) -> tuple[str, str, str, np.ndarray]:
    """An int8 weight with one scale and one zero point per index of `axis`: names of all three, and the scales."""
    weight = net.normal(shape, float(np.sqrt(2.0 / fan_in)))
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = (np.abs(weight).max(axis=others, keepdims=True) / 127).astype(np.float32)
    steps = np.clip(np.round(weight / scale), -127, 127).astype(np.int8)
    flat = scale.reshape(-1)
    zero = net.const(np.zeros(flat.size, dtype=np.int8), "zero_point")
    return net.const(steps, "w"), net.const(flat, "scale"), zero, flat


def int_bias(net: Net, scale: np.ndarray) -> str:
    """An int32 bias, N(0, 0.3²) in units of `scale`."""
    return net.const(np.round(net.normal(scale.shape, 0.3) / scale).astype(np.int32), "b")


def fake_quantize(net: Net, x: str, scale: float, zero: int) -> str:
    """QuantizeLinear and DequantizeLinear, per tensor, to uint8."""
    s, z = scalar(net, scale), point(net, zero)
    return net.op("DequantizeLinear", net.op("QuantizeLinear", x, s, z), s, z)


def qdq_conv(net: Net, x: str, n_in: int, n_out: int, in_scale: float) -> str:
    """Convolution whose weight and bias come from DequantizeLinear, per output channel."""
    w, s, z, scale = signed_weight(net, (n_out, n_in, 3, 3), 9 * n_in, 0)
    weight = net.op("DequantizeLinear", w, s, z, axis=0)
    scale = (scale * np.float32(in_scale)).astype(np.float32)
    bias = net.op("DequantizeLinear", int_bias(net, scale), net.const(scale, "scale"), axis=0)
    return net.op("Conv", x, weight, bias, pads=[1] * 4, kernel_shape=[3, 3])


@synthetic(11, "quantized")  # 6 + 5; per-channel scales and zero points on the output axis
def qdq_conv_net(net: Net) -> None:
    h = fake_quantize(net, net.image(), IN_SCALE, 128)
    h = fake_quantize(net, net.relu(qdq_conv(net, h, 3, 6, IN_SCALE)), HIDDEN_SCALE, 0)
    h = fake_quantize(net, net.relu(qdq_conv(net, h, 6, 5, HIDDEN_SCALE)), HIDDEN_SCALE, 0)
    net.classify(h, 5)


@synthetic(8, "quantized")  # 8; activations quantized per hidden unit
def qdq_per_axis_activation(net: Net) -> None:
    h = net.gemm(net.input("x", ["N", 5]), 5, 8)
    scale = net.const(net.rng.uniform(0.02, 0.05, 8).astype(np.float32), "scale")
    zero = net.const(net.rng.integers(100, 150, 8).astype(np.uint8), "zero_point")
    h = net.op("DequantizeLinear", net.op("QuantizeLinear", h, scale, zero, axis=1), scale, zero, axis=1)
    net.output(net.gemm(h, 8, 3), ["N", 3])


def qlinear_conv(net: Net, x: str, n_in: int, n_out: int, quant_in: tuple[float, int]) -> str:
    """QLinearConv from `quant_in` to (HIDDEN_SCALE, 0): saturation at zero is the Relu."""
    w, s, z, scale = signed_weight(net, (n_out, n_in, 3, 3), 9 * n_in, 0)
    bias = int_bias(net, (scale * np.float32(quant_in[0])).astype(np.float32))
    source = [x, scalar(net, quant_in[0]), point(net, quant_in[1])]
    target = [scalar(net, HIDDEN_SCALE), point(net, 0)]
    return net.op("QLinearConv", *source, w, s, z, *target, bias, pads=[1] * 4, kernel_shape=[3, 3])


@synthetic(11, "quantized")  # 6 + 5
def qlinear_conv_net(net: Net) -> None:
    h = net.op("QuantizeLinear", net.image(), scalar(net, IN_SCALE), point(net, 128))
    h = qlinear_conv(net, h, 3, 6, (IN_SCALE, 128))
    h = qlinear_conv(net, h, 6, 5, (HIDDEN_SCALE, 0))
    net.classify(net.op("DequantizeLinear", h, scalar(net, HIDDEN_SCALE), point(net, 0)), 5)


def qlinear_matmul(net: Net, x: str, n_in: int, n_out: int, quant_in: tuple[float, int]) -> str:
    """QLinearMatMul with one weight scale per column, from `quant_in` to (HIDDEN_SCALE, 0)."""
    w, s, z, _ = signed_weight(net, (n_in, n_out), n_in, 1)
    source = [x, scalar(net, quant_in[0]), point(net, quant_in[1])]
    return net.op("QLinearMatMul", *source, w, s, z, scalar(net, HIDDEN_SCALE), point(net, 0))


@synthetic(15, "quantized")  # 8 + 7
def qlinear_matmul_net(net: Net) -> None:
    h = net.op("QuantizeLinear", net.input("x", ["N", 5]), scalar(net, IN_SCALE), point(net, 128))
    h = qlinear_matmul(net, h, 5, 8, (IN_SCALE, 128))
    h = qlinear_matmul(net, h, 8, 7, (HIDDEN_SCALE, 0))
    h = net.op("DequantizeLinear", h, scalar(net, HIDDEN_SCALE), point(net, 0))
    net.output(net.gemm(h, 7, 3), ["N", 3])


# 6 for sure; 14 where DynamicQuantizeLinear (one scale for the tensor) and MatMulInteger have rules
@synthetic(None, "quantized", at_least=0, note="14 with rules for DynamicQuantizeLinear and MatMulInteger")
def dynamic_quantization(net: Net) -> None:
    h, n_in = net.input("x", ["N", 5]), 5
    for n_out in (8, 6):
        quantized, scale, zero = net.multi("DynamicQuantizeLinear", [h], 3)
        w, s, _, _ = signed_weight(net, (n_in, n_out), n_in, 1)
        product = net.op("Cast", net.op("MatMulInteger", quantized, w, zero), to=1)
        h = net.relu(net.op("Add", net.op("Mul", product, net.op("Mul", scale, s)), net.bias(n_out)))
        n_in = n_out
    net.output(net.gemm(h, 6, 3), ["N", 3])
