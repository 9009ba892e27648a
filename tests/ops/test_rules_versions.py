"""An operator in its old and its new form (attributes that became inputs, changed defaults) gets the same spaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from tests.ops.sample import Case, Sample, check

S, SIGNED, SCALED, FULL, PART = "S(6)", "B(6)", "R>0 wr S(6)", "R* wr S(6)", "R* wr S(3)"
Write = Callable[[Sample], Any]
FORMS: list[Case] = []


def form(op: str, group: str | tuple[str, ...], *opsets: int) -> Callable[[Write], Write]:
    """One way to write an operator, for some opsets."""

    def add(write: Write) -> Write:
        spaces = (group,) if isinstance(group, str) else group
        FORMS.extend(Case(op, f"{op}-{n}", write, tuple(sorted(spaces)), n) for n in opsets)
        return write

    return add


def dense(op: str, group: str | tuple[str, ...], opsets: tuple[int, ...], *constants: Any, **attributes: Any) -> None:
    """The operator on (3, 6), read by a matrix."""

    @form(op, group, *opsets)
    def write(net: Sample) -> None:
        net.read(net.op(op, net.vector(), *(net.const(c) for c in constants), **attributes))


# bounds, slopes, exponents
dense("Clip", SCALED, (6, 10), min=0.0)
dense("Clip", SCALED, (11, 12, 13), 0.0)
dense("Clip", SIGNED, (6, 10), min=-0.5, max=0.5)
dense("Clip", SIGNED, (11, 13), -0.5, 0.5)
dense("Dropout", FULL, (7, 10), ratio=0.4)
dense("Dropout", FULL, (12, 13, 22), 0.4)
dense("Pow", FULL, (7, 12, 13, 15), 2.0)
dense("PRelu", SCALED, (7, 9, 16), np.linspace(0.1, 0.6, 6))
dense("Max", SCALED, (8, 12, 13), 0.0)
dense("Cast", FULL, (9, 13, 19), to=1)
dense("LeakyRelu", SCALED, (6, 16), alpha=0.1)


# ---------------------------------------------------------------- axes as attributes, then as inputs
def reduction(op: str, group: str, before: int, after: int) -> None:
    @form(op, group, before)
    def old(net: Sample) -> None:
        net.read(net.op(op, net.sequence(), axes=[1], keepdims=0))

    @form(op, group, after)
    def new(net: Sample) -> None:
        net.read(net.op(op, net.sequence(), net.const([1]), keepdims=0))


reduction("ReduceSum", FULL, 11, 13)
reduction("ReduceMean", FULL, 17, 18)
reduction("ReduceMax", SCALED, 12, 18)
reduction("ReduceL2", FULL, 13, 18)


@form("ReduceSum", FULL, 13, 18)
def no_axes_means_none(net: Sample) -> None:
    net.read(net.op("ReduceSum", net.vector(), noop_with_empty_axes=1))


@form("ReduceSum", S, 11, 13)
def no_axes_means_all(net: Sample) -> None:
    net.result(net.op("ReduceSum", net.vector(), keepdims=0))


@form("Squeeze", FULL, 7, 11)
def squeeze_attribute(net: Sample) -> None:
    net.read(net.op("Squeeze", net.op("Unsqueeze", net.vector(), axes=[1]), axes=[1]))


@form("Squeeze", FULL, 13, 21)
def squeeze_input(net: Sample) -> None:
    net.read(net.op("Squeeze", net.op("Unsqueeze", net.vector(), net.const([1])), net.const([1])))


def halves(net: Sample, head: str, tail: str) -> None:
    """Add two halves of (3, 12): pairs move together."""
    net.read(net.op("Add", head, tail), 6, "r")


@form("Split", FULL, 7, 11)
def split_attribute(net: Sample) -> None:
    halves(net, *net.multi("Split", [net.vector(12)], 2, axis=1, split=[6, 6]))


@form("Split", FULL, 11)
def split_evenly(net: Sample) -> None:
    halves(net, *net.multi("Split", [net.vector(12)], 2, axis=1))


@form("Split", FULL, 13, 18)
def split_input(net: Sample) -> None:
    halves(net, *net.multi("Split", [net.vector(12), net.const([6, 6])], 2, axis=1))


@form("Split", FULL, 18)
def split_count(net: Sample) -> None:
    halves(net, *net.multi("Split", [net.vector(12)], 2, axis=1, num_outputs=2))


@form("Slice", FULL, 9)
def slice_pairs_attributes(net: Sample) -> None:
    h = net.vector(12)
    halves(net, *(net.op("Slice", h, axes=[1], starts=[a], ends=[b]) for a, b in ((0, 6), (-6, 2**31 - 1))))


@form("Slice", FULL, 10, 11, 13)
def slice_pairs_inputs(net: Sample) -> None:
    h, axis = net.vector(12), net.const([-1])
    bounds = ((0, 6), (-6, 2**31 - 1))
    halves(net, *(net.op("Slice", h, net.const([a]), net.const([b]), axis) for a, b in bounds))


@form("Pad", FULL, 7, 10)
def pad_attribute(net: Sample) -> None:
    net.read(net.op("Pad", net.picture(), pads=[0, 0, 1, 1, 0, 0, 1, 1]), image=True)


@form("Pad", FULL, 11, 13, 18)
def pad_input(net: Sample) -> None:
    net.read(net.op("Pad", net.picture(), net.const([0, 0, 1, 1, 0, 0, 1, 1]), net.const(0.0)), image=True)


@form("Pad", FULL, 18)
def pad_axes(net: Sample) -> None:
    net.read(net.op("Pad", net.picture(), net.const([1, 1, 1, 1]), "", net.const([-1, 2])), image=True)


@form("Pad", S, 10)
def pad_value_attribute(net: Sample) -> None:
    net.read(net.op("Pad", net.picture(), pads=[0, 0, 1, 1, 0, 0, 1, 1], value=1.0), image=True)


@form("TopK", (), 9)
def top_k_attribute(net: Sample) -> None:
    net.result(net.multi("TopK", [net.vector()], 2, axis=1, k=3)[1], TensorProto.INT64)


@form("TopK", (), 10, 11)
def top_k_input(net: Sample) -> None:
    net.result(net.multi("TopK", [net.vector(), net.const([3])], 2, axis=1)[1], TensorProto.INT64)


# ---------------------------------------------------------------- sizes of images
SCALES = np.array([1, 1, 2, 2], np.float32)


@form("Upsample", FULL, 8)
def upsample_attribute(net: Sample) -> None:
    net.read(net.op("Upsample", net.picture(), scales=SCALES.tolist()), image=True)


@form("Upsample", FULL, 9)
def upsample_input(net: Sample) -> None:
    net.read(net.op("Upsample", net.picture(), net.const(SCALES)), image=True)


@form("Resize", FULL, 10)
def resize_ten(net: Sample) -> None:
    net.read(net.op("Resize", net.picture(), net.const(SCALES)), image=True)


@form("Resize", FULL, 11)
def resize_eleven(net: Sample) -> None:
    net.read(net.op("Resize", net.picture(), net.const(np.zeros(0, np.float32)), net.const(SCALES)), image=True)


@form("Resize", FULL, 13, 18)
def resize_sizes(net: Sample) -> None:
    net.read(net.op("Resize", net.picture(), "", "", net.const([2, 6, 9, 9])), image=True)


@form("Resize", FULL, 18)
def resize_axes(net: Sample) -> None:
    net.read(net.op("Resize", net.picture(), "", net.const(SCALES[2:]), axes=[2, 3]), image=True)


@form("MaxPool", SCALED, 8, 10, 12, 22)
def max_pool(net: Sample) -> None:
    net.read(net.op("MaxPool", net.picture(), kernel_shape=[2, 2], strides=[2, 2]), image=True)


@form("AveragePool", FULL, 7, 10, 11, 19)
def average_pool(net: Sample) -> None:
    net.read(net.op("AveragePool", net.picture(), kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1), image=True)


@form("BatchNormalization", "(R>0^2 x ±1^2) wr S(6)", 7, 9, 14, 15)
def batch_normalization(net: Sample) -> None:
    net.read(net.batch_norm(net.picture(), 6), image=True)


@form("InstanceNormalization", SIGNED, 6, 22)
def instance_normalization(net: Sample) -> None:
    y = net.op("InstanceNormalization", net.picture(), net.positive((6,)), net.bias(6))
    net.read(net.op("Sigmoid", y), image=True)


# ---------------------------------------------------------------- softmax over the rest, then over one axis
for _op in ("Softmax", "LogSoftmax"):

    @form(_op, S, 7, 11, 13)
    def last_axis(net: Sample, op: str = _op) -> None:
        net.read(net.op(op, net.vector(), axis=1))

    @form(_op, S, 7, 11)
    def all_from_axis_one(net: Sample, op: str = _op) -> None:
        net.read(net.op(op, net.sequence()))


@form("Hardmax", (), 11, 13)
def hardmax(net: Sample) -> None:
    net.read(net.op("Hardmax", net.op("Min", net.vector(), net.const(-2.0)), axis=1))


@form("Scatter", (), 9)
def scatter(net: Sample) -> None:
    index = net.const(np.array([[1], [4], [2]]))
    net.read(net.op("Scatter", net.vector(), index, net.const(np.ones((3, 1))), axis=1))


@form("ScatterElements", (), 11, 18)
def scatter_elements(net: Sample) -> None:
    index = net.const(np.array([[1], [4], [2]]))
    net.read(net.op("ScatterElements", net.vector(), index, net.const(np.ones((3, 1))), axis=1))


@form("Gemm", SCALED, 7, 9, 11, 13)
def gemm(net: Sample) -> None:
    w, c = net.weight((4, 6), 4), net.bias(6)
    net.made("h", w, 1)
    net.made("h", c, 0)
    net.read(net.op("Relu", net.op("Gemm", net.source((3, 4)), w, c)))


@form("QuantizeLinear", S, 10, 13, 19, 21)
def quantize_per_tensor(net: Sample) -> None:
    s, z = net.const(np.float32(0.02)), net.const(np.uint8(20))
    net.read(net.op("DequantizeLinear", net.op("QuantizeLinear", net.vector(), s, z), s, z))


@form("QuantizeLinear", SCALED, 13, 19, 21)
def quantize_per_axis(net: Sample) -> None:
    s, z = net.const(np.linspace(0.01, 0.03, 6, dtype=np.float32)), net.const(np.arange(20, 26, dtype=np.uint8))
    net.read(net.op("DequantizeLinear", net.op("QuantizeLinear", net.vector(), s, z), s, z))


for _op in ("Flatten", "Transpose", "Identity"):

    @form(_op, FULL, 7, 13, 21)
    def plain(net: Sample, op: str = _op) -> None:
        h = net.op(op, net.vector())
        net.read(net.op("Transpose", h) if op == "Transpose" else h)


@pytest.mark.parametrize("case", FORMS, ids=[f"{c.name}-{c.write.__name__}-{k}" for k, c in enumerate(FORMS)])
def test_the_form_has_the_same_spaces(case: Case) -> None:
    assert check(case) == []


def test_spaces_that_no_form_has_are_reported() -> None:
    wrong = next(c for c in FORMS if c.op == "Clip" and c.opset == 6)
    assert check(Case(wrong.op, wrong.name, wrong.write, (FULL,), wrong.opset))
