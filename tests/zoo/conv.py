"""Convolutional networks: flatten, shortcuts, groups, depthwise, up- and down-sampling."""

from __future__ import annotations

from tests.zoo.net import Net
from tests.zoo.registry import synthetic


@synthetic(13, "conv")  # 6 channels (each 16 columns of the Gemm) + 7
def conv_flatten_gemm(net: Net) -> None:
    h = net.relu(net.conv(net.image(size=4), 3, 6))
    h = net.relu(net.gemm(net.op("Flatten", h, axis=1), 6 * 16, 7))
    net.output(net.gemm(h, 7, 3), ["N", 3])


@synthetic(13, "conv", "reference", "float64", dtype="float64")  # 6 + 7; onnxruntime has no double Conv on the CPU
def conv_float64(net: Net) -> None:
    h = net.relu(net.conv(net.image(size=4), 3, 6))
    h = net.relu(net.gemm(net.op("Flatten", h, axis=1), 6 * 16, 7))
    net.output(net.gemm(h, 7, 3), ["N", 3])


@synthetic(14, "conv")  # 6 + 8, pools and average pools keep channels apart
def conv_pool(net: Net) -> None:
    h = net.op("MaxPool", net.relu(net.conv(net.image(), 3, 6)), kernel_shape=[2, 2], strides=[2, 2])
    h = net.op("AveragePool", net.relu(net.conv(h, 6, 8)), kernel_shape=[3, 3])
    net.output(net.gemm(net.op("Flatten", h), 8, 3), ["N", 3])


@synthetic(22, "conv")  # stream of 10, whose middle 6 are the first stage's 6; inner 5 + 7
def zero_pad_shortcut(net: Net) -> None:
    s = net.relu(net.conv(net.image(), 3, 6))
    inner = net.conv(net.relu(net.conv(s, 6, 5)), 5, 6)
    s = net.relu(net.op("Add", inner, s))
    inner = net.conv(net.relu(net.conv(s, 6, 7, stride=2)), 7, 10)
    ends = [net.const([2**31 - 1] * 2), net.const([2, 3]), net.const([2, 2])]
    half = net.op("Slice", s, net.const([0, 0]), *ends)
    short = net.op("Pad", half, net.const([0, 2, 0, 0, 0, 2, 0, 0]), net.const(0.0), mode="constant")
    net.classify(net.relu(net.op("Add", inner, short)), 10)


@synthetic(21, "conv")  # stream of 8 read by every block and by the head; inner 6 + 7
def residual_blocks(net: Net) -> None:
    s = net.conv(net.image(), 3, 8)
    for inner in (6, 7):
        branch = net.relu(net.batch_norm(net.conv(net.relu(s), 8, inner, bias=False), inner))
        s = net.op("Add", s, net.conv(branch, inner, 8))
    net.classify(net.relu(s), 8)


@synthetic(18, "conv")  # 6 in + 12 out: groups are blocks, the channels stay units
def grouped_conv(net: Net) -> None:
    h = net.relu(net.conv(net.image(), 3, 6))
    net.classify(net.relu(net.conv(h, 6, 12, group=3)), 12)


@synthetic(15, "conv")  # 8 (depthwise ties its output to its input) + 7
def depthwise(net: Net) -> None:
    h = net.relu(net.conv(net.image(), 3, 8))
    h = net.relu(net.conv(h, 8, 8, group=8))
    net.classify(net.relu(net.conv(h, 8, 7, k=1)), 7)


@synthetic(None, "conv", at_least=19)  # 12 outputs + 7 for sure; the 6 inputs are each alone in their group
def depthwise_multiplier_two(net: Net) -> None:
    h = net.relu(net.conv(net.image(), 3, 6))
    h = net.relu(net.conv(h, 6, 12, group=6))
    net.classify(net.relu(net.conv(h, 12, 7, k=1)), 7)


@synthetic(33, "conv")  # 6 + 18 + 9: a shuffled unit has a group on either side and is still one unit
def channel_shuffle(net: Net) -> None:
    h = net.relu(net.conv(net.image(), 3, 6))
    h = net.relu(net.conv(h, 6, 18, k=1, group=3))
    h = net.op("Reshape", h, net.const([0, 3, 6, 6, 6]))
    h = net.op("Reshape", net.op("Transpose", h, perm=[0, 2, 1, 3, 4]), net.const([0, 18, 6, 6]))
    net.classify(net.relu(net.conv(h, 18, 9, group=3)), 9)


@synthetic(13, "conv")  # 7 channels after the shuffle (each 4 channels of the convolution before) + 6
def pixel_shuffle_dcr(net: Net) -> None:
    h = net.relu(net.conv(net.image(), 3, 28))
    h = net.op("DepthToSpace", h, blocksize=2, mode="DCR")
    net.classify(net.relu(net.conv(h, 7, 6)), 6)


@synthetic(13, "conv")  # as above, the 4 channels adjacent
def pixel_shuffle_crd(net: Net) -> None:
    h = net.relu(net.conv(net.image(), 3, 28))
    h = net.op("DepthToSpace", h, blocksize=2, mode="CRD")
    net.classify(net.relu(net.conv(h, 7, 6)), 6)


@synthetic(13, "conv")  # the CRD shuffle spelled out: 7 + 6
def pixel_shuffle_reshape(net: Net) -> None:
    h = net.relu(net.conv(net.image(), 3, 28))
    h = net.op("Transpose", net.op("Reshape", h, net.const([0, 7, 2, 2, 6, 6])), perm=[0, 1, 4, 2, 5, 3])
    h = net.op("Reshape", h, net.const([0, 7, 12, 12]))
    net.classify(net.relu(net.conv(h, 7, 6)), 6)


@synthetic(13, "conv")  # 7 channels (each 4 inputs of the next convolution) + 6
def space_to_depth(net: Net) -> None:
    h = net.relu(net.conv(net.image(), 3, 7))
    h = net.op("SpaceToDepth", h, blocksize=2)
    net.classify(net.relu(net.conv(h, 28, 6)), 6)


@synthetic(30, "conv")  # 6 (skip) + 8 + 7 (up) + 9: concat keeps its pieces apart
def unet_concat_skip(net: Net) -> None:
    skip = net.relu(net.conv(net.image(), 3, 6))
    down = net.op("MaxPool", skip, kernel_shape=[2, 2], strides=[2, 2])
    down = net.relu(net.conv(down, 6, 8))
    weight = net.weight((8, 7, 2, 2), 8)
    up = net.op("ConvTranspose", down, weight, net.bias(7), kernel_shape=[2, 2], strides=[2, 2])
    joined = net.op("Concat", skip, net.relu(up), axis=1)
    net.classify(net.relu(net.conv(joined, 13, 9)), 9)


@synthetic(18, "conv")  # 6 in + 12 out: weight (6, 12/3, k, k), groups are blocks
def grouped_conv_transpose(net: Net) -> None:
    h = net.relu(net.conv(net.image(), 3, 6))
    weight = net.weight((6, 4, 2, 2), 2)
    h = net.op("ConvTranspose", h, weight, net.bias(12), kernel_shape=[2, 2], strides=[2, 2], group=3)
    net.classify(net.relu(h), 12)


@synthetic(13, "conv")  # 7 + 6, scales given
def resize_scales(net: Net) -> None:
    h = net.relu(net.conv(net.image(), 3, 7))
    h = net.op("Resize", h, "", net.const([1.0, 1.0, 2.0, 2.0], dtype="float32"), mode="nearest")
    net.classify(net.relu(net.conv(h, 7, 6)), 6)


@synthetic(13, "conv")  # 7 + 6, sizes given: the literal holds the channel count
def resize_sizes(net: Net) -> None:
    h = net.relu(net.conv(net.image(batch=2), 3, 7))
    h = net.op("Resize", h, "", "", net.const([2, 7, 9, 9]), mode="linear")
    net.classify(net.relu(net.conv(h, 7, 6)), 6, batch=2)


@synthetic(18, "conv")  # 8 + 4 (squeeze) + 6
def squeeze_excitation(net: Net) -> None:
    h = net.relu(net.conv(net.image(), 3, 8))
    gate = net.relu(net.conv(net.op("GlobalAveragePool", h), 8, 4, k=1))
    gate = net.op("Sigmoid", net.conv(gate, 4, 8, k=1))
    net.classify(net.relu(net.conv(net.op("Mul", h, gate), 8, 6)), 6)


@synthetic(14, "conv")  # 8 + 6: a mask with one channel broadcasts
def broadcast_mask_input(net: Net) -> None:
    mask = net.input("mask", ["N", 1, 6, 6])
    h = net.op("Mul", net.relu(net.conv(net.image(), 3, 8)), mask)
    net.classify(net.relu(net.conv(h, 8, 6)), 6)


@synthetic(None, "conv", at_least=14)  # 8 + 6; the gate's single channel may or may not count as a unit
def broadcast_mask_conv(net: Net) -> None:
    h = net.relu(net.conv(net.image(), 3, 8))
    gate = net.op("Sigmoid", net.conv(h, 8, 1))
    net.classify(net.relu(net.conv(net.op("Mul", h, gate), 8, 6)), 6)


@synthetic(14, "conv")  # 8 + 6, one-dimensional convolution with dilation
def conv1d(net: Net) -> None:
    x = net.input("x", ["N", 3, 12])
    h = net.relu(net.op("Conv", x, net.weight((8, 3, 3), 9), net.bias(8), dilations=[2], kernel_shape=[3]))
    h = net.relu(net.op("Conv", h, net.weight((6, 8, 3), 24), net.bias(6), kernel_shape=[3]))
    net.classify(h, 6)


@synthetic(14, "conv")  # 8 + 6: zero padding as its own node, spatial only
def spatial_pad(net: Net) -> None:
    h = net.relu(net.conv(net.image(), 3, 8))
    h = net.op("Pad", h, net.const([0, 0, 1, 1, 0, 0, 1, 1]), mode="reflect")
    net.classify(net.relu(net.conv(h, 8, 6)), 6)
