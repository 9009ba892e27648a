"""Cases for operators that change shapes, and for those that select, join, pad and scatter."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper
from tests.ops.sample import Sample, case

S, FULL = "S(6)", "R* wr S(6)"
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
PART = "R* wr S(3)"


# ---------------------------------------------------------------- shapes
@case("Reshape", FULL)
def merged_positions(net: Sample) -> None:
    net.read(net.op("Reshape", net.sequence(), net.const([-1, 6])))


@case("Reshape", FULL)  # (2, 6, 6, 6) flattened: 36 rows of the consumer per unit
def flattened_channels(net: Sample) -> None:
    w = net.weight((216, 3), 216)
    net.result(net.op("MatMul", net.op("Reshape", net.picture(), net.const([0, -1])), w))


@case("Reshape", S)
def to_its_own_shape(net: Sample) -> None:
    h = net.vector()
    net.read(net.op("Sigmoid", net.op("Reshape", h, net.op("Shape", h))))


@case("Flatten", FULL)
def flatten(net: Sample) -> None:
    net.read(net.op("Flatten", net.sequence(), axis=2))


@case("Squeeze", FULL)
def squeeze(net: Sample) -> None:
    pooled = net.op("GlobalAveragePool", net.picture())
    net.read(net.op("Squeeze", pooled, net.const([2, 3])))


@case("Unsqueeze", FULL)
def unsqueeze(net: Sample) -> None:
    net.read(net.op("Unsqueeze", net.vector(), net.const([1])))


@case("Transpose", FULL)
def channels_last(net: Sample) -> None:
    net.read(net.op("Transpose", net.picture(), perm=[0, 2, 3, 1]))


@case("Expand", FULL)
def over_a_new_axis(net: Sample) -> None:
    net.read(net.op("Expand", net.vector(), net.const([2, 3, 6])))


@case("Expand", S)  # one number per row, spread over the units
def uniform_partner(net: Sample) -> None:
    row = net.op("ReduceMean", net.source((3, 4)), net.const([1]))
    net.read(net.op("Add", net.vector(), net.op("Expand", row, net.const([3, 6]))))


@case("Shape", FULL)
def target_of_a_reshape(net: Sample) -> None:
    h = net.sequence()
    net.read(net.op("Reshape", net.op("Reshape", h, net.const([10, 6])), net.op("Shape", h)))


@case("Size", FULL)
def divisor(net: Sample) -> None:
    h = net.vector()
    net.read(net.op("Div", h, net.op("Cast", net.op("Size", h), to=FLOAT)))


@case("ConstantOfShape", S)
def of_an_open_shape(net: Sample) -> None:
    net.feeds["rows"] = np.ones((3, 4), np.float32)
    h = net._dense(net.input("rows", ["N", 4]), 6, "h", False, 1.0)
    fill = net.op("ConstantOfShape", net.op("Shape", h), value=_tensor(0.4))
    net.read(net.op("Sigmoid", net.op("Add", h, fill)))


@case("ConstantOfShape", FULL)  # a parameter of equal entries
def of_a_constant_shape(net: Sample) -> None:
    fill = net.op("ConstantOfShape", net.const([6]), value=_tensor(0.4))
    net.read(net.op("Sigmoid", net.op("Mul", net.vector(), fill)))


def _tensor(value: float) -> onnx.TensorProto:
    return helper.make_tensor("value", FLOAT, [1], [value])


@case("Range")
def added_ramp(net: Sample) -> None:
    ramp = net.op("Range", net.const(0.0), net.const(6.0), net.const(1.0))
    net.read(net.op("Add", net.vector(), ramp))


@case("DepthToSpace", "S(2)")  # the four channels of a pixel block move together
def depth_columns(net: Sample) -> None:
    h = net.op("DepthToSpace", net.picture(8), blocksize=2, mode="CRD")
    net.read(h, 2, "r", image=True)


@case("DepthToSpace", "S(2)")
def depth_rows(net: Sample) -> None:
    h = net.op("DepthToSpace", net.picture(8), blocksize=2, mode="DCR")
    net.read(h, 2, "r", image=True)


@case("SpaceToDepth", FULL)
def space(net: Sample) -> None:
    net.read(net.op("SpaceToDepth", net.picture(), blocksize=2), 24, "r", image=True)


def _resize(op: str, opset: int, name: str) -> None:
    @case(op, FULL, name=name, opset=opset)
    def write(net: Sample) -> None:
        scales = net.const(np.array([1, 1, 2, 2], np.float32))
        inputs = [net.picture(), scales] if opset < 11 else [net.picture(), "", scales]
        net.read(net.op(op, *inputs, mode="linear"), image=True)


_resize("Upsample", 9, "scales")
_resize("Resize", 10, "scales_10")
_resize("Resize", 20, "scales_20")


@case("Resize")  # the size stays, 6.9 is cut to 6, but the channels are interpolated
def channels_by_a_little(net: Sample) -> None:
    scales = net.const(np.array([1, 1.15, 2, 2], np.float32))
    net.read(net.op("Resize", net.picture(), "", scales, mode="nearest"), image=True)


# ---------------------------------------------------------------- what depends on positions or chance
@case("NonZero")
def nonzero(net: Sample) -> None:
    net.result(net.op("NonZero", net.op("Relu", net.vector())), INT64)


@case("EyeLike")
def identity_matrix(net: Sample) -> None:
    h = net.vector()
    net.read(net.op("Add", h, net.op("EyeLike", h)))


@case("Bernoulli")
def coins(net: Sample) -> None:
    net.read(net.op("Bernoulli", net.op("Sigmoid", net.op("Mul", net.vector(), net.const(4.0))), seed=1.0))


for _op in ("RandomNormalLike", "RandomUniformLike"):

    @case(_op, name="added")
    def noise_like(net: Sample, op: str = _op) -> None:
        h = net.vector()
        net.read(net.op("Add", h, net.op(op, h, seed=1.0)))


for _op in ("RandomNormal", "RandomUniform"):

    @case(_op, name="added")
    def noise(net: Sample, op: str = _op) -> None:
        net.read(net.op("Add", net.vector(), net.op(op, shape=[3, 6], seed=1.0)))


@case("Trilu")
def triangle(net: Sample) -> None:
    net.read(net.op("Trilu", net.vector(), upper=0))


@case("Compress")
def compressed(net: Sample) -> None:
    keep = net.const(np.array([True, False, True, True, False, False]))
    net.result(net.op("Compress", net.vector(), keep, axis=1))


@case("OneHot")
def one_hot(net: Sample) -> None:
    index = net.op("Cast", net.op("Clip", net.vector(), net.const(0.0), net.const(3.0)), to=INT64)
    net.result(net.op("OneHot", index, net.const([4]), net.const(np.array([0, 1], np.float32))))


@case("Unique")
def unique(net: Sample) -> None:
    net.result(net.op("Unique", net.vector(), sorted=0))


@case("NonMaxSuppression")
def suppression(net: Sample) -> None:
    boxes = net.sequence(4)  # the units are the corners
    scores = net.const(net.rng.uniform(0.2, 1, (2, 1, 5)).astype(np.float32))
    rest = [net.const([5]), net.const(0.1), net.const(0.0)]
    net.result(net.op("NonMaxSuppression", boxes, scores, *rest), INT64)


@case("ReverseSequence")
def reversed_units(net: Sample) -> None:
    h = net.op("Transpose", net.vector())
    y = net.op("ReverseSequence", h, net.const([2, 4, 6]), time_axis=0, batch_axis=1)
    net.read(net.op("Transpose", y))


# ---------------------------------------------------------------- selections
@case("Slice", "R>0 wr S(3)", PART)
def two_halves(net: Sample) -> None:
    h = net.vector()
    parts = [net.op("Slice", h, net.const([a]), net.const([b]), net.const([1])) for a, b in ((0, 3), (3, 6))]
    net.read(net.op("Relu", net.op("Neg", parts[0])), 3, "first")
    net.read(parts[1], 3, "second")


@case("Slice", FULL)
def other_axis(net: Sample) -> None:
    net.read(net.op("Slice", net.sequence(), net.const([3]), net.const([-5]), net.const([1]), net.const([-1])))


@case("Slice", PART)  # max(h[:3], h[3:]) in pairs
def maxout(net: Sample) -> None:
    h = net.vector()
    parts = [net.op("Slice", h, net.const([a]), net.const([b]), net.const([1])) for a, b in ((0, 3), (3, 6))]
    net.read(net.op("Sub", *parts), 3, "r")


@case("Split", "R>0 wr S(2)", "R* wr S(4)")
def unequal_parts(net: Sample) -> None:
    a, b = net.multi("Split", [net.vector(), net.const([2, 4])], 2, axis=1)
    net.read(net.op("Relu", a), 2, "first")
    net.read(b, 4, "second")


@case("Concat", "R>0 wr S(6)", FULL)
def two_sources(net: Sample) -> None:
    parts = [net.op("Relu", net.vector(units="h")), net.vector(units="k")]
    net.read(net.op("Concat", *parts, axis=1), 12, "r")


@case("Concat", "R>0 wr S(6)")
def twice_the_same(net: Sample) -> None:
    h = net.vector()
    net.read(net.op("Concat", h, net.op("Relu", net.op("Abs", h)), axis=1), 12, "r")


@case("Concat", FULL)
def along_time(net: Sample) -> None:
    net.read(net.op("Concat", net.sequence(), net.sequence(), axis=1))


@case("Concat", FULL)  # with a part that is fixed
def with_the_input(net: Sample) -> None:
    net.read(net.op("Concat", net.source((3, 4)), net.vector(), axis=1), 10, "r")


@case("Gather", FULL)
def a_permutation(net: Sample) -> None:
    net.read(net.op("Gather", net.vector(), net.const([3, 0, 5, 1, 2, 4]), axis=1), 6, "r")


@case("Gather", "R* wr S(1)", "R* wr S(2)", "R* wr S(3)")  # nothing reads unit 5
def repeated_and_dropped(net: Sample) -> None:
    net.read(net.op("Gather", net.vector(), net.const([0, 0, 1, 2, 3, 3, 4]), axis=1), 7, "r")


@case("Gather")
def chosen_at_run_time(net: Sample) -> None:
    net.feeds["ids"] = np.array([1, 4, 2, 2, 0, 3])
    net.read(net.op("Gather", net.vector(), net.input("ids", [6], INT64), axis=1))


@case("GatherElements")
def gathered_elements(net: Sample) -> None:
    index = net.const(net.rng.integers(0, 6, (3, 6)))
    net.result(net.op("GatherElements", net.vector(), index, axis=1))


@case("GatherND", FULL)
def gathered_rows(net: Sample) -> None:
    net.read(net.op("GatherND", net.vector(), net.const([[2], [0]])))


def _scatter(op: str, opset: int) -> None:
    @case(op, name="elements", opset=opset)
    def write(net: Sample) -> None:
        index, update = net.const(net.rng.integers(0, 6, (3, 1))), net.const(np.full((3, 1), 2.0))
        net.read(net.op(op, net.vector(), index, update, axis=1))


_scatter("ScatterElements", 20)
_scatter("Scatter", 10)


@case("ScatterND", FULL)
def scattered_rows(net: Sample) -> None:
    net.read(net.op("ScatterND", net.vector(), net.const([[1]]), net.weight((1, 6), 6)))


@case("ScatterND")
def rows_from_outside(net: Sample) -> None:
    rows = net.op("CumSum", net.const(np.ones((1, 6))), net.const(1))
    net.read(net.op("ScatterND", net.vector(), net.const([[1]]), rows))


# ---------------------------------------------------------------- padding and repetition
@case("Pad", FULL)
def zeros_in_space(net: Sample) -> None:
    net.read(net.op("Pad", net.picture(), net.const([0, 0, 1, 1, 0, 0, 1, 1])), image=True)


@case("Pad", S)
def ones_in_space(net: Sample) -> None:
    net.read(net.op("Pad", net.picture(), net.const([0, 0, 1, 1, 0, 0, 1, 1]), net.const(1.0)), image=True)


@case("Pad", FULL)
def mirror_in_space(net: Sample) -> None:
    net.read(net.op("Pad", net.picture(), net.const([1, 1, 1, 1]), "", net.const([2, 3]), mode="reflect"), image=True)


@case("Pad", FULL, PART)  # three further channels of zeros: their consumers' rows move too
def zero_channels(net: Sample) -> None:
    net.read(net.op("Pad", net.vector(), net.const([0, 1, 0, 2])), 9, "r")


ONES = {f"h:{kind}": "the ones cannot follow, and are not told apart from the rest" for kind in ("scale", "sign")}


@case("Pad", "S(3)", "S(3)", "blocks S(2)", coarse=ONES)
def a_one_in_each_head(net: Sample) -> None:
    """(3, 2, 3) to (3, 2, 4), read without and by the last position, as linear attention writes its sums."""
    h = net.op("Pad", net.op("Reshape", net.vector(), net.const([3, 2, 3])), net.const([0] * 5 + [1]), net.const(1.0))
    first = net.op("Slice", h, net.const([0]), net.const([3]), net.const([2]))
    last = net.op("Slice", h, net.const([3]), net.const([4]), net.const([2]))
    net.read(net.op("Reshape", net.op("Div", first, last), net.const([3, 6])))


@case("Pad")
def mirrored_channels(net: Sample) -> None:
    net.read(net.op("Pad", net.vector(), net.const([0, 1, 0, 2]), mode="reflect"), 9, "r")


@case("Tile", FULL)
def repeated_units(net: Sample) -> None:
    net.read(net.op("Tile", net.vector(), net.const([1, 2])), 12, "r")


@case("Tile", S)
def uniform_tile(net: Sample) -> None:
    row = net.op("ReduceMean", net.source((3, 4)), net.const([1]))
    net.read(net.op("Add", net.vector(), net.op("Tile", row, net.const([1, 6]))))
