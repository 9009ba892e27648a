"""Cases for contractions, convolutions, pooling, normalizations and reductions."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto
from tests.ops.sample import Sample, case

S, SIGNED, SCALED, FULL = "S(6)", "B(6)", "R>0 wr S(6)", "R* wr S(6)"


# ---------------------------------------------------------------- contractions
@case("MatMul", FULL)
def weight_on_the_left(net: Sample) -> None:
    column = net.op("Transpose", net.vector())  # (6, 3)
    w = net.weight((2, 6), 6)
    net.taken("h", w, 1)
    net.result(net.op("MatMul", w, column))


@case("MatMul", FULL)
def with_a_vector(net: Sample) -> None:
    w = net.weight((6,), 6)
    net.taken("h", w, 0)
    net.result(net.op("MatMul", net.vector(), w))


@case("MatMul", FULL)  # x y' over the units: what x gains, y loses
def of_two_activations(net: Sample) -> None:
    a, b = net.sequence(units="h"), net.sequence(units="k")
    net.result(net.op("MatMul", a, net.op("Transpose", b, perm=[0, 2, 1])))


@case("Gemm", SCALED)
def bias_per_unit(net: Sample) -> None:
    w, c = net.weight((6, 4), 4), net.bias(6)
    net.made("h", w, 0)
    net.made("h", c, 0)
    net.read(net.op("Relu", net.op("Gemm", net.source((3, 4)), w, c, transB=1, alpha=0.5, beta=2.0)))


@case("Gemm", S)
def one_bias_for_all(net: Sample) -> None:
    w = net.weight((4, 6), 4)
    net.made("h", w, 1)
    net.read(net.op("Gemm", net.source((3, 4)), w, net.const(np.array([0.7], np.float32))))


@case("Gemm", FULL)
def transposed_input(net: Sample) -> None:
    w = net.weight((6, 3), 6)
    net.taken("h", w, 0)
    net.result(net.op("Gemm", net.op("Transpose", net.vector()), w, transA=1))


def _einsum(name: str, equation: str, shape: tuple[int, ...], axis: int) -> None:
    @case("Einsum", FULL, name=name)
    def write(net: Sample) -> None:
        w = net.weight(shape, 6)
        net.taken("h", w, axis)
        net.result(net.op("Einsum", net.sequence(), w, equation=equation))


_einsum("matrix", "bti,io->bto", (6, 3), 0)
_einsum("implicit", "bti,oi", (3, 6), 1)
_einsum("ellipsis", "...i,io->...o", (6, 3), 0)


@case("Einsum", "(R>0^2 x ±1^2) wr S(6)")
def gains(net: Sample) -> None:
    net.read(net.op("Einsum", net.sequence(), net.positive((6,)), equation="bti,i->bti"))


@case("Einsum", S)
def sum_over_units(net: Sample) -> None:
    net.result(net.op("Einsum", net.sequence(), equation="bti->bt"))


@case("MatMulInteger", S, S)
def integer_matrix(net: Sample) -> None:
    q = net.op("QuantizeLinear", net.vector(), net.const(0.02), net.const(np.uint8(128)))
    w = net.const(net.rng.integers(-60, 60, (6, 6)).astype(np.int8))
    net.taken("h", w, 0)
    net.made("k", w, 1)
    product = net.op("Cast", net.op("MatMulInteger", q, w, net.const(np.uint8(128))), to=TensorProto.FLOAT)
    net.read(net.op("Sigmoid", net.op("Mul", product, net.const(5e-4))), units="k")


# ---------------------------------------------------------------- convolutions
@case("Conv", FULL)
def strided(net: Sample) -> None:
    w = net.weight((3, 6, 3, 3), 54)
    net.taken("h", w, 1)
    net.result(
        net.op("Conv", net.picture(), w, net.bias(3), kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")
    )


@case("Conv", "(R>0^2) wr S(6)")
def depthwise(net: Sample) -> None:
    w, b = net.weight((6, 1, 3, 3), 9), net.bias(6)
    net.read(net.op("Relu", net.op("Conv", net.op("Relu", net.picture()), w, b, group=6)), image=True)


@case("Conv", "S(3)", "S(3)", "S(4)", "S(4)", "blocks S(2)")
def grouped(net: Sample) -> None:
    w, b = net.weight((8, 3, 3, 3), 27), net.bias(8)
    y = net.op("Sigmoid", net.op("Conv", net.op("Sigmoid", net.picture()), w, b, group=2))
    net.made("k", w, 0)
    net.made("k", b, 0)
    net.read(y, 8, "k", image=True)


@case("Conv", "S(3)")  # coarse: the groups share one permutation of their channels
def grouped_with_computed_weight(net: Sample) -> None:
    w = net.op("Mul", net.weight((8, 3, 3, 3), 27), net.const(0.5))
    net.result(net.op("Conv", net.op("Sigmoid", net.picture()), w, group=2))


@case("Conv", "S(3)", "S(3)", "S(4)", "S(4)", "blocks S(2)")  # both inputs move with the weight
def grouped_weight_used_twice(net: Sample) -> None:
    w = net.weight((8, 3, 3, 3), 27)
    parts = [net.op("Conv", net.op("Sigmoid", net.picture(units=u)), w, group=2) for u in ("h", "g")]
    net.read(net.op("Sigmoid", net.op("Sub", *parts)), 8, "k", image=True)


@case("Conv", "S(3)", "S(4)", "S(4)", "blocks S(2)")  # another use shares one permutation among groups
def grouped_weight_used_otherwise(net: Sample) -> None:
    w = net.weight((8, 3, 3, 3), 27)
    net.read(net.op("Sigmoid", net.op("Conv", net.op("Sigmoid", net.picture()), w, group=2)), 8, "k", image=True)
    net.read(net.op("ReduceSum", w, net.const([0, 2, 3]), keepdims=0), 3, "sums")


@case("ConvTranspose", FULL)
def upsampling(net: Sample) -> None:
    w = net.weight((6, 3, 2, 2), 24)
    net.taken("h", w, 0)
    net.result(net.op("ConvTranspose", net.picture(), w, net.bias(3), strides=[2, 2]))


@case("ConvTranspose", "S(3)", "S(3)", "S(4)", "S(4)", "blocks S(2)")
def grouped_upsampling(net: Sample) -> None:
    w, b = net.weight((6, 4, 2, 2), 24), net.bias(8)
    y = net.op("Sigmoid", net.op("ConvTranspose", net.op("Sigmoid", net.picture()), w, b, group=2))
    net.made("k", b, 0)
    net.read(y, 8, "k", image=True)


@case("ConvInteger", S, S)
def integer_kernel(net: Sample) -> None:
    q = net.op("QuantizeLinear", net.picture(), net.const(0.02), net.const(np.uint8(128)))
    w = net.const(net.rng.integers(-60, 60, (6, 6, 1, 1)).astype(np.uint8))
    net.taken("h", w, 1)
    net.made("k", w, 0)
    y = net.op("Cast", net.op("ConvInteger", q, w, net.const(np.uint8(128))), to=TensorProto.FLOAT)
    net.read(net.op("Sigmoid", net.op("Mul", y, net.const(5e-4))), units="k", image=True)


# ---------------------------------------------------------------- pooling
def _pool(op: str, group: str, *, coarse: dict[str, str] | None = None, **attributes: Any) -> None:
    @case(op, group, name="image", coarse=coarse)
    def write(net: Sample) -> None:
        net.read(net.op(op, net.picture(), **attributes), image=True)


_pool("GlobalAveragePool", FULL)
_pool("AveragePool", FULL, kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1)
_pool("MaxPool", SCALED, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4, ceil_mode=1)
_pool("GlobalMaxPool", SCALED)
_pool("LpPool", FULL, kernel_shape=[2, 2], p=2)
_pool("GlobalLpPool", FULL, p=2)


@case("MaxPool")
def with_indices(net: Sample) -> None:
    values, indices = net.multi("MaxPool", [net.picture()], 2, kernel_shape=[2, 2], strides=[2, 2])
    net.result(values)
    net.result(indices, TensorProto.INT64)


@case("MaxRoiPool", SCALED)
def regions(net: Sample) -> None:
    rois = net.const(np.array([[0, 0, 0, 3, 3], [1, 1, 1, 5, 5]], np.float32))
    net.read(net.op("MaxRoiPool", net.picture(), rois, pooled_shape=[2, 2]), image=True)


@case("RoiAlign", SCALED, coarse={"h:sign": "averages keep signs, but maxima, the other mode, do not"})
def aligned_regions(net: Sample) -> None:
    rois = net.const(np.array([[0, 0, 3, 3], [1, 1, 5, 5]], np.float32))
    out = net.op("RoiAlign", net.picture(), rois, net.const([0, 1]), output_height=2, output_width=2)
    net.read(out, image=True)


@case("LRN")
def neighbours(net: Sample) -> None:
    net.read(net.op("LRN", net.picture(), size=3, alpha=1.0), image=True)


# ---------------------------------------------------------------- normalizations
@case("BatchNormalization", "(R>0^2 x ±1^2) wr S(6)")  # into it and out of it
def inference(net: Sample) -> None:
    net.read(net.batch_norm(net.picture(), 6), image=True)


@case("BatchNormalization", FULL)
def before_an_activation(net: Sample) -> None:
    net.read(net.op("Sigmoid", net.batch_norm(net.picture(), 6)), image=True)


@case("BatchNormalization")
def of_a_fixed_axis(net: Sample) -> None:
    net.result(net.batch_norm(net.source((2, 3, 6, 6)), 3))


def _normalized(op: str, group: str, activation: str, opset: int = 20, *, bias: bool = False) -> None:
    shapes = {op: (3, 6)} if op == "SimplifiedLayerNormalization" else None

    @case(op, group, name=f"into_{activation.lower()}", opset=opset, shapes=shapes)
    def write(net: Sample) -> None:
        h, gamma = net.vector(), net.positive((6,))
        net.read(net.op(activation, net.op(op, h, gamma, *([net.bias(6)] if bias else []), axis=-1)))


_normalized("LayerNormalization", S, "Sigmoid", bias=True)
_normalized("LayerNormalization", SCALED, "Relu", bias=True)
_normalized("RMSNormalization", SIGNED, "Sigmoid", 23)
_normalized("RMSNormalization", "(±1^2) wr S(6)", "Tanh", 23)
_normalized("SimplifiedLayerNormalization", SIGNED, "Sigmoid")


@case("LayerNormalization")
def statistics_over_units(net: Sample) -> None:
    h = net.op("Transpose", net.vector())  # (6, 3), normalized over the 3
    y, mean = net.multi("LayerNormalization", [h, net.positive((3,)), net.bias(3)], 2)
    net.result(net.op("MatMul", net.weight((2, 6), 6), net.op("Add", y, mean)))


@case("InstanceNormalization", "B(6)")
def per_channel(net: Sample) -> None:
    y = net.op("InstanceNormalization", net.picture(), net.positive((6,)), net.bias(6))
    net.read(net.op("Sigmoid", y), image=True)


def _groups(name: str, opset: int, size: int) -> None:
    @case("GroupNormalization", "S(3)", "S(3)", "blocks S(2)", name=name, opset=opset)
    def write(net: Sample) -> None:
        y = net.op("GroupNormalization", net.picture(), net.positive((size,)), net.bias(size), num_groups=2)
        net.read(net.op("Sigmoid", y), image=True)


_groups("parameters_per_group", 20, 2)
_groups("parameters_per_channel", 21, 6)

for _op in ("Softmax", "LogSoftmax"):

    @case(_op, S, name="over_units")
    def over_units(net: Sample, op: str = _op) -> None:
        net.read(net.op(op, net.vector(), axis=-1))

    @case(_op, S, name="over_positions")
    def over_positions(net: Sample, op: str = _op) -> None:
        net.read(net.op(op, net.sequence(), axis=1))


@case("LpNormalization", S, coarse={"h:sign": "the norm does not see signs"})
def unit_length(net: Sample) -> None:
    net.read(net.op("LpNormalization", net.vector(), axis=-1, p=2))


@case("MeanVarianceNormalization", S, coarse={"h:sign": "the statistics are per channel only for the usual axes"})
def per_channel_statistics(net: Sample) -> None:
    net.read(net.op("MeanVarianceNormalization", net.picture(), axes=[0, 2, 3]), image=True)


@case("Hardmax")
def first_of_equals(net: Sample) -> None:
    net.read(net.op("Hardmax", net.op("Min", net.vector(), net.const(-2.0)), axis=-1))


# ---------------------------------------------------------------- reductions
_ENDS = {"h:sign": "the sign ends before the sum"}
_REDUCTIONS: dict[str, tuple[str, bool, dict[str, str], dict[str, str]]] = {
    # group along the other axes, needs positive values, coarse there, coarse along units
    "ReduceSum": (FULL, False, {}, {}),
    "ReduceMean": (FULL, False, {}, {}),
    "ReduceMax": (SCALED, False, {}, {}),
    "ReduceMin": (SCALED, False, {}, {}),
    "ReduceL1": (FULL, False, {}, _ENDS),
    "ReduceL2": (FULL, False, {}, _ENDS),
    "ReduceSumSquare": (FULL, False, {}, _ENDS),
    "ReduceLogSumExp": (S, False, {}, {}),
    "ReduceLogSum": (SIGNED, True, {}, {}),
    "ReduceProd": (S, False, {"h:sign": "a product of an odd number of entries keeps the sign"}, {}),
}


def _reduction(op: str, group: str, positive: bool, passing: dict[str, str], ending: dict[str, str]) -> None:
    @case(op, group, name="over_positions", coarse=passing)
    def over(net: Sample) -> None:
        h = net.op("Abs", net.sequence()) if positive else net.sequence()
        net.read(net.op(op, h, net.const([1]), keepdims=0))

    @case(op, S, name="over_units", coarse=ending)
    def along(net: Sample) -> None:
        net.result(net.op(op, net.vector(positive=positive), net.const([-1]), keepdims=0))

    # the two heads may change places at each position, and positions as wholes
    @case(op, "S(2)", "S(2)", "S(2)", "blocks S(3)", name="over_heads", coarse=ending)
    def heads(net: Sample) -> None:
        h = net.op("Reshape", net.vector(positive=positive), net.const([3, 2, 3]))
        net.read(net.op(op, h, net.const([1]), keepdims=0), 3, "r")


for _op, _row in _REDUCTIONS.items():
    _reduction(_op, *_row)


def _ordered(op: str, outputs: int, inputs: tuple[Any, ...] = (), **attributes: Any) -> None:
    @case(op, name="over_units")
    def write(net: Sample) -> None:
        values = net.multi(op, [net.vector(), *(net.const(v) for v in inputs)], outputs, **attributes)
        net.result(values[0], TensorProto.INT64 if op.startswith("Arg") else TensorProto.FLOAT)
        if outputs > 1:
            net.result(values[1], TensorProto.INT64)

    @case(op, "S(3)", name="over_heads")  # the heads stay, their positions share one permutation
    def heads(net: Sample) -> None:
        h = net.op("Reshape", net.sequence(), net.const([2, 5, 2, 3]))
        at: dict[str, Any] = dict.fromkeys(attributes, 2)
        values = net.multi(op, [h, *(net.const(np.full_like(v, 2)) for v in inputs)], outputs, **at)
        flat = net.op("Reshape", net.op("Cast", values[-1], to=TensorProto.FLOAT), net.const([2, 5, -1]))
        net.read(flat, 3 if op.startswith("Arg") else 6)


_ordered("ArgMax", 1, axis=1)
_ordered("ArgMin", 1, axis=1)
_ordered("TopK", 2, (np.array([3]),), axis=1)
_ordered("CumSum", 1, (np.array(1),))


@case("CumSum")
def read_over_units(net: Sample) -> None:
    net.read(net.op("CumSum", net.vector(), net.const(1)))


@case("CumSum", FULL)
def over_time(net: Sample) -> None:
    net.read(net.op("CumSum", net.sequence(), net.const(1)))


@case("Einsum", "R* wr S(5)", "R* wr S(6)")
def three_operands(net: Sample) -> None:
    a, b = net.weight((6, 5), 6), net.weight((5, 3), 5)
    net.taken("h", a, 0)
    net.made("i", a, 1)
    net.taken("i", b, 0)
    net.result(net.op("Einsum", net.sequence(), a, b, equation="bsh,hi,io->bso"))


@case("Einsum", "R* wr S(6)", "(R>0^2 x ±1^2) wr S(6)")
def three_operands_share_an_index(net: Sample) -> None:
    gate = net.sequence(units="g")
    net.read(net.op("Einsum", net.sequence(), gate, reader_of(net), equation="bsh,bsg,hg->bsg"), units="g")


def reader_of(net: Sample) -> str:
    """A weight (h, g) of which only h is consumed."""
    w = net.weight((6, 6), 6)
    net.taken("h", w, 0)
    net.made("g", w, 1)
    return w


@case("Einsum", "S(3)", "S(3)", "S(3)", "S(3)", "blocks S(2)")
def linear_attention(net: Sample) -> None:
    """Of each head a matrix of keys by values: neither can be scaled, as far as the rule knows."""
    q, k, v = (net.op("Reshape", net.sequence(units=u), net.const([2, 5, 2, 3])) for u in ("q", "k", "v"))
    y = net.op("Einsum", q, k, v, equation="bthd,bshd,bshe->bthe")
    table = net.op("Einsum", k, v, equation="bshd,bshe->bhde")
    y = net.op("Add", y, net.op("Einsum", q, table, equation="bthd,bhde->bthe"))
    net.read(net.op("Reshape", y, net.const([2, 5, 6])), units="o")


@case("MatMul", *("R>0 wr S(6)",) * 4)
def stacked_experts(net: Sample) -> None:
    """Units of each expert have an order of their own, in the bias too."""
    h = net.op("MatMul", net.source((4, 5, 4)), net.weight((4, 4, 6), 4))
    h = net.op("Relu", net.op("Add", h, net.const(net.normal((4, 1, 6), 0.3))))
    net.result(net.op("MatMul", h, net.weight((4, 6, 3), 6)))


@case("MatMul", "B(6)")
def stack_with_two_uses(net: Sample) -> None:
    """The transposed stack is read too: its experts share one order."""
    w = net.weight((4, 4, 6), 4)
    h = net.op("MatMul", net.source((4, 5, 4)), w)
    net.result(net.op("MatMul", h, net.op("Transpose", w, perm=[0, 2, 1])))
