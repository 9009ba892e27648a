"""Index shuffling: rolls, splits, slices, gathers, tiles, reshapes with computed targets."""

from __future__ import annotations

import numpy as np
from tests.zoo.net import INT64, Net
from tests.zoo.registry import synthetic


def hidden(net: Net, width: int = 8) -> str:
    """Input (N, 5), Gemm and Relu: (N, width)."""
    return net.relu(net.gemm(net.input("x", ["N", 5]), 5, width))


def cut(net: Net, x: str, start: int, end: int, axis: int = 1, step: int = 1) -> str:
    """Slice along one axis."""
    return net.op("Slice", x, *(net.const([value]) for value in (start, end, axis, step)))


def roll(net: Net, x: str, width: int, shift: int) -> str:
    """Rotate axis 1 by `shift`: Slice, Slice, Concat."""
    return net.op("Concat", cut(net, x, shift, width), cut(net, x, 0, shift), axis=1)


@synthetic(14, "layout")  # 8 (read in a rotated order) + 6
def roll_channels(net: Net) -> None:
    h = roll(net, net.relu(net.conv(net.image(), 3, 8)), 8, 3)
    net.classify(net.relu(net.conv(h, 8, 6)), 6)


@synthetic(10, "layout")  # 4 pairs (i, i + 4), since adding the half-turn ties them, + 6
def roll_add(net: Net) -> None:
    h = net.relu(net.conv(net.image(), 3, 8))
    h = net.op("Add", h, roll(net, h, 8, 4))
    net.classify(net.relu(net.conv(h, 8, 6)), 6)


# 12: the halves lie in one weight axis, but Relu units may not trade places with Sigmoid units
@synthetic(12, "layout")
def split_two_roles(net: Net) -> None:
    left, right = net.multi("Split", [net.gemm(net.input("x", ["N", 5]), 5, 12), net.const([6, 6])], 2, axis=1)
    joined = net.op("Concat", net.relu(left), net.op("Sigmoid", right), axis=1)
    net.output(net.gemm(joined, 12, 3), ["N", 3])


@synthetic(12, "layout")  # 4 + 8, the sizes are literals
def split_sizes(net: Net) -> None:
    small, large = net.multi("Split", [hidden(net, 12), net.const([4, 8])], 2, axis=1)
    net.output(net.op("Add", net.gemm(small, 4, 3), net.gemm(large, 8, 3)), ["N", 3])


@synthetic(4, "layout")  # 4 pairs: Split without sizes, the halves meet in Max
def split_equal_maxout(net: Net) -> None:
    left, right = net.multi("Split", [net.gemm(net.input("x", ["N", 5]), 5, 8)], 2, axis=-1, num_outputs=2)
    net.output(net.gemm(net.op("Max", left, right), 4, 3), ["N", 3])


@synthetic(4, "layout")  # 4 pairs (2i, 2i + 1): strided slices meet in Max
def maxout_slices(net: Net) -> None:
    h = net.gemm(net.input("x", ["N", 5]), 5, 8)
    pair = net.op("Max", cut(net, h, 0, 8, step=2), cut(net, h, 1, 8, step=2))
    net.output(net.gemm(pair, 4, 3), ["N", 3])


# 12 children in 6 blocks; whether the blocks that are left after ReduceMax count as units is a matter of naming
@synthetic(None, "layout")
def maxout_reshape(net: Net) -> None:
    h = net.op("Reshape", net.gemm(net.input("x", ["N", 5]), 5, 12), net.const([0, 6, 2]))
    h = net.op("ReduceMax", h, net.const([2]), keepdims=0)
    net.output(net.gemm(h, 6, 3), ["N", 3])


@synthetic(8, "layout")  # 8: a constant index table is one more permutation
def gather_permutation(net: Net) -> None:
    h = net.op("Gather", hidden(net), net.const(net.rng.permutation(8)), axis=1)
    net.output(net.gemm(h, 8, 3), ["N", 3])


@synthetic(8, "layout")  # 8: unit 2 occurs three times, unit 5 not at all, the others once: still 8 classes
def gather_repeated(net: Net) -> None:
    h = net.op("Gather", hidden(net), net.const([0, 1, 2, 2, 2, 3, 4, 6, 7]), axis=1)
    net.output(net.gemm(h, 9, 3), ["N", 3])


# only the last 6: an index from outside may read any of the first 8
@synthetic(6, "layout", "pins", ranges={"index": 8})
def gather_dynamic(net: Net) -> None:
    h = net.op("Gather", hidden(net), net.input("index", [4], INT64), axis=1)
    net.output(net.gemm(net.relu(net.gemm(h, 4, 6)), 6, 3), ["N", 3])


@synthetic(8, "layout")  # 8, each twice in the contracted axis
def concat_self(net: Net) -> None:
    h = hidden(net)
    net.output(net.gemm(net.op("Concat", h, h, axis=1), 16, 3), ["N", 3])


@synthetic(8, "layout")  # 8: (h, -h) as in CReLU
def concat_relu(net: Net) -> None:
    h = net.gemm(net.input("x", ["N", 5]), 5, 8)
    both = net.relu(net.op("Concat", h, net.op("Neg", h), axis=1))
    net.output(net.gemm(both, 16, 3), ["N", 3])


@synthetic(8, "layout")  # 8, each twice
def tile_hidden(net: Net) -> None:
    h = net.op("Tile", hidden(net), net.const([1, 2]))
    net.output(net.gemm(h, 16, 3), ["N", 3])


@synthetic(13, "layout")  # 6 channels + 7; the target is (Shape(h)[0], 96)
def reshape_computed_batch(net: Net) -> None:
    h = net.relu(net.conv(net.image(size=4), 3, 6))
    batch = net.op("Gather", net.op("Shape", h), net.const(0), axis=0)
    target = net.op("Concat", net.op("Unsqueeze", batch, net.const([0])), net.const([96]), axis=0)
    h = net.relu(net.gemm(net.op("Reshape", h, target), 96, 7))
    net.output(net.gemm(h, 7, 3), ["N", 3])


# 6 channels + 7; the target is (N, C * 16) with C read from the shape, and back to (N, 6, 4, 4)
@synthetic(13, "layout")
def reshape_computed_channels(net: Net) -> None:
    h = net.relu(net.conv(net.image(size=4), 3, 6))
    shape = net.op("Shape", h)
    sizes = [net.op("Gather", shape, net.const([axis]), axis=0) for axis in range(2)]
    flat = net.op("Reshape", h, net.op("Concat", sizes[0], net.op("Mul", sizes[1], net.const([16])), axis=0))
    h = net.op("Reshape", net.op("Tanh", flat), net.op("Concat", sizes[0], net.const([6, 4, 4]), axis=0))
    net.classify(net.relu(net.conv(h, 6, 7)), 7)


@synthetic(13, "layout")  # 6 + 7: one free dimension in the target
def reshape_minus_one(net: Net) -> None:
    h = net.relu(net.conv(net.image(size=4), 3, 6))
    h = net.relu(net.gemm(net.op("Reshape", h, net.const([-1, 96])), 96, 7))
    net.output(net.gemm(h, 7, 3), ["N", 3])


@synthetic(13, "layout")  # 6 + 7: channels-last flatten, labels vary fastest
def flatten_channels_last(net: Net) -> None:
    h = net.op("Transpose", net.relu(net.conv(net.image(size=4), 3, 6)), perm=[0, 2, 3, 1])
    h = net.relu(net.gemm(net.op("Reshape", h, net.const([0, -1])), 96, 7))
    net.output(net.gemm(h, 7, 3), ["N", 3])


@synthetic(8, "layout")  # 8: a learned token, expanded to the batch with a computed shape, leads the sequence
def expand_class_token(net: Net) -> None:
    x = net.input("x", ["N", "T", 5])
    h = net.linear(x, 5, 8)
    batch = net.op("Shape", x, start=0, end=1)
    token = net.op("Expand", net.const(net.normal((1, 1, 8), 1.0)), net.op("Concat", batch, net.const([1, 8]), axis=0))
    h = net.op("ReduceMean", net.op("Tanh", net.op("Concat", token, h, axis=1)), net.const([1]), keepdims=0)
    net.output(net.gemm(h, 8, 3), ["N", 3])


@synthetic(8, "layout")  # 8: (N, 8) -> (N, 8, 1, 1) -> expanded over the image
def unsqueeze_expand(net: Net) -> None:
    code = net.op("Unsqueeze", hidden(net), net.const([2, 3]))
    wide = net.op("Expand", code, net.const([1, 8, 4, 4]))
    mask = net.input("mask", ["N", 1, 4, 4])
    net.classify(net.op("Mul", wide, mask), 8)


# 8, and the 3 inputs of the next layer that only ever see padding zeros: free atoms too, if one counts them
@synthetic(None, "layout", at_least=8)
def pad_channels(net: Net) -> None:
    h = net.op("Pad", hidden(net), net.const([0, 1, 0, 2]), net.const(0.0))
    net.output(net.gemm(h, 11, 3), ["N", 3])


# 8 if the trailing axes of ScatterND pass, 0 if it pins
@synthetic(None, "layout", note="8 where trailing axes pass")
def scatter_nd(net: Net) -> None:
    h = net.relu(net.gemm(net.input("x", [2, 5]), 5, 8))
    h = net.op("ScatterND", net.const(np.zeros((4, 8))), net.const([[1], [3]]), h)
    net.output(net.gemm(h, 8, 3), [4, 3])


# 8 if the trailing axes of GatherND pass, 0 if it pins
@synthetic(None, "layout", ranges={"index": 2}, note="8 where trailing axes pass; needs a batch of two or more")
def gather_nd(net: Net) -> None:
    h = net.relu(net.linear(net.input("x", ["N", "T", 5]), 5, 8))
    h = net.op("GatherND", h, net.input("index", [6, 2], INT64))
    net.output(net.gemm(h, 8, 3), [6, 3])
