"""Normalizations, in their fused and their spelled-out forms."""

from __future__ import annotations

from tests.zoo.net import Net
from tests.zoo.registry import synthetic


@synthetic(14, "norm")  # 8 + 6
def batch_norm_relu(net: Net) -> None:
    h = net.relu(net.batch_norm(net.conv(net.image(), 3, 8, bias=False), 8))
    net.classify(net.relu(net.batch_norm(net.conv(h, 8, 6), 6)), 6)


@synthetic(14, "norm")  # 8 + 6, no activation between
def batch_norm_linear(net: Net) -> None:
    h = net.batch_norm(net.conv(net.image(), 3, 8, bias=False), 8)
    net.classify(net.relu(net.conv(h, 8, 6)), 6)


@synthetic(14, "norm")  # 8 + 6, BatchNorm on (N, C)
def batch_norm_1d(net: Net) -> None:
    h = net.relu(net.batch_norm(net.gemm(net.input("x", ["N", 5]), 5, 8), 8))
    net.output(net.gemm(net.relu(net.batch_norm(net.gemm(h, 8, 6), 6)), 6, 3), ["N", 3])


@synthetic(14, "norm")  # 8 + 6: scale and shift of shape (C,) through Unsqueeze
def batch_norm_mul_add(net: Net) -> None:
    h = net.conv(net.image(), 3, 8, bias=False)
    scale, shift = (net.op("Unsqueeze", value, net.const([1, 2])) for value in (net.positive((8,)), net.bias(8)))
    h = net.relu(net.op("Add", net.op("Mul", h, scale), shift))
    net.classify(net.relu(net.conv(h, 8, 6)), 6)


@synthetic(18, "norm", opset=21)  # 12 + 6: the three groups are blocks
def group_norm(net: Net) -> None:
    h = net.conv(net.image(), 3, 12)
    h = net.relu(net.op("GroupNormalization", h, net.positive((12,)), net.bias(12), num_groups=3))
    net.classify(net.relu(net.conv(h, 12, 6)), 6)


# 12 + 6: InstanceNormalization on (N, G, -1) is a group norm
@synthetic(18, "norm")
def group_norm_reshape(net: Net) -> None:
    h = net.conv(net.image(), 3, 12)
    grouped = net.op("Reshape", h, net.const([0, 3, -1]))
    grouped = net.op("InstanceNormalization", grouped, net.const([1.0] * 3), net.const([0.0] * 3))
    back = net.op("Reshape", grouped, net.op("Shape", h))
    h = net.relu(net.op("Add", net.op("Mul", back, net.positive((12, 1, 1))), net.const(net.normal((12, 1, 1), 0.3))))
    net.classify(net.relu(net.conv(h, 12, 6)), 6)


@synthetic(14, "norm")  # 8 + 6
def instance_norm(net: Net) -> None:
    h = net.relu(net.op("InstanceNormalization", net.conv(net.image(), 3, 8), net.positive((8,)), net.bias(8)))
    net.classify(net.relu(net.conv(h, 8, 6)), 6)


@synthetic(14, "norm")  # 8 + 6
def layer_norm(net: Net) -> None:
    h = net.gemm(net.input("x", ["N", 5]), 5, 8)
    h = net.op("LayerNormalization", h, net.positive((8,)), net.bias(8), axis=-1)
    net.output(net.gemm(net.relu(net.gemm(h, 8, 6)), 6, 3), ["N", 3])


@synthetic(14, "norm")  # 8 + 6: ReduceMean, Sub, Pow, Sqrt, Div
def layer_norm_spelled_out(net: Net) -> None:
    h = net.gemm(net.input("x", ["N", 5]), 5, 8)
    centred = net.op("Sub", h, net.op("ReduceMean", h, net.const([-1])))
    variance = net.op("ReduceMean", net.op("Pow", centred, net.const(2.0)), net.const([-1]))
    h = net.op("Div", centred, net.op("Sqrt", net.op("Add", variance, net.const(1e-5))))
    h = net.op("Add", net.op("Mul", h, net.positive((8,))), net.bias(8))
    net.output(net.gemm(net.relu(net.gemm(h, 8, 6)), 6, 3), ["N", 3])


@synthetic(14, "norm", opset=23)  # stream 8 + 6
def rms_norm(net: Net) -> None:
    h = net.gemm(net.input("x", ["N", 5]), 5, 8)
    h = net.op("RMSNormalization", h, net.positive((8,)), axis=-1)
    net.output(net.gemm(net.relu(net.gemm(h, 8, 6)), 6, 3), ["N", 3])


@synthetic(14, "norm")  # 8 + 6: x * rsqrt(mean(x^2) + eps) * gamma
def rms_norm_spelled_out(net: Net) -> None:
    h = net.gemm(net.input("x", ["N", 5]), 5, 8)
    square = net.op("ReduceMean", net.op("Pow", h, net.const(2.0)), net.const([-1]))
    root = net.op("Reciprocal", net.op("Sqrt", net.op("Add", square, net.const(1e-6))))
    h = net.op("Mul", net.positive((8,)), net.op("Mul", h, root))
    net.output(net.gemm(net.relu(net.gemm(h, 8, 6)), 6, 3), ["N", 3])


@synthetic(14, "norm")  # 8 + 6: channels-last LayerNorm between two Transposes, as in ConvNeXt
def layer_norm_channels(net: Net) -> None:
    h = net.op("Transpose", net.conv(net.image(), 3, 8), perm=[0, 2, 3, 1])
    h = net.op("LayerNormalization", h, net.positive((8,)), net.bias(8), axis=-1)
    h = net.op("Transpose", h, perm=[0, 3, 1, 2])
    net.classify(net.relu(net.conv(h, 8, 6)), 6)


@synthetic(8, "norm", "pins")  # only the second layer's 8: LRN mixes neighbours, so the first 6 keep their order
def local_response_norm(net: Net) -> None:
    h = net.op("LRN", net.relu(net.conv(net.image(), 3, 6)), size=3, alpha=0.5)
    net.classify(net.relu(net.conv(h, 6, 8)), 8)


@synthetic(14, "norm")  # 8 + 6: unit vectors along the hidden axis
def lp_normalization(net: Net) -> None:
    h = net.op("LpNormalization", net.relu(net.gemm(net.input("x", ["N", 5]), 5, 8)), axis=-1, p=2)
    net.output(net.gemm(net.relu(net.gemm(h, 8, 6)), 6, 3), ["N", 3])
