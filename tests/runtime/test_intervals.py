"""Bounds of values: what a run gives lies within them, zeros are exact, too tight ones are noticed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper
from tests import zoo
from tests.zoo.feeds import Feeds
from tests.zoo.net import Net

from cipm_ir.runtime.intervals.arithmetic import REAL, SINGLE, Interval, add, contract, divide, multiply
from cipm_ir.runtime.intervals.bounds import Intervals, along, find_intervals
from cipm_ir.runtime.session import Runner
from cipm_ir.symmetry.program import Program

Array = NDArray[Any]

MODELS = [
    "mlp_relu", "mlp_gelu", "mlp_silu", "mlp_prelu", "mlp_clip06", "mlp_float16", "mlp_float64", "mlp_square",
    "conv_flatten_gemm", "conv_pool", "zero_pad_shortcut", "residual_blocks", "grouped_conv", "depthwise",
    "channel_shuffle", "pixel_shuffle_dcr", "space_to_depth", "unet_concat_skip", "grouped_conv_transpose",
    "squeeze_excitation", "roll_channels", "pad_channels", "concat_relu", "split_sizes", "gather_repeated",
    "batch_norm_relu", "group_norm", "instance_norm", "layer_norm", "rms_norm", "attention_separate", "attention_op_3d",
    "attention_op_4d", "einsum_layers", "lstm", "gru", "channel_reducesum", "channel_reducel2", "tied_embedding",
    "bert", "llama_gqa", "mobilenetv2_revived", "resnet20",
]  # fmt: skip
UNDERSTOOD = ("conv_flatten_gemm", "residual_blocks", "channel_shuffle", "attention_separate", "layer_norm", "mlp_gelu")


def analysed(model: Any) -> Program:
    return Program.of(ir.from_proto(model))


def ranges(feeds: Feeds) -> dict[str, tuple[float, float]]:
    return {name: (float(array.min()), float(array.max())) for name, array in feeds.items()}


def outside(program: Program, found: Intervals, feeds: Feeds) -> dict[str, float]:
    """Values that leave their bounds in a run, and by how much."""
    names = [v.name for node in program.model.graph for v in node.outputs if v.name in found.values]
    with Runner(program.model, extra_outputs=[n for n in names if n]) as runner:
        seen = runner.run(feeds)
    bad = {}
    for name, array in seen.items():
        if name in found.values and array.dtype.kind in "fiub":
            bounds, wide = found.values[name], array.astype(np.float64)
            assert bounds.rank == wide.ndim
            excess = float(np.maximum(bounds.lo - wide, wide - bounds.hi).max(initial=0.0))
            if not excess <= 0:
                bad[name] = excess
    return bad


@pytest.mark.parametrize("name", MODELS)
def test_runs_stay_within_bounds(name: str) -> None:
    model = zoo.build_or_skip(name)
    program = analysed(model)
    for seed in (0, 1):
        feeds = zoo.feeds(name, model, seed)
        found = find_intervals(program.model, program.analysis, ranges(feeds))
        assert outside(program, found, feeds) == {}
    assert outside(program, find_intervals(program.model, program.analysis), feeds) == {}


@pytest.mark.parametrize("name", [n for n in UNDERSTOOD if n != "attention_separate"])  # sums over a dynamic axis
def test_bounded_inputs_bound_every_value(name: str) -> None:
    model = zoo.build(name)
    program = analysed(model)
    found = find_intervals(program.model, program.analysis, ranges(zoo.feeds(name, model)))
    assert all(np.isfinite(x.lo).all() and np.isfinite(x.hi).all() for x in found.values.values())


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_control_shrunken_bounds_are_left(name: str) -> None:
    """Negative control: bounds of half the inputs' range, with the inputs as they are."""
    model = zoo.build(name)
    program, feeds = analysed(model), zoo.feeds(name, model)
    half = {n: (low / 2, high / 2) for n, (low, high) in ranges(feeds).items()}
    found = find_intervals(program.model, program.analysis, half)
    values = {n: Interval(x.lo / 8, x.hi / 8) for n, x in found.values.items()}
    assert outside(program, Intervals(program.analysis, values, found.parameters), feeds)


# ---------------------------------------------------------------- what is exact
def dense(weight: Array, bias: Array, *then: str) -> Program:
    net = Net("dense")
    h = net.op("Gemm", net.input("x", ["N", weight.shape[0]]), net.const(weight), net.const(bias))
    for op in then:
        h = net.op(op, h)
    out = net.gemm(h, weight.shape[1], 2)
    net.output(out, ["N", 2])
    return analysed(net.model())


def hidden(program: Program, found: Intervals) -> tuple[Array, Array]:
    """Bounds of what the last node reads."""
    last = len(program.analysis.walk.nodes) - 1
    bounds, state = found.operand(last, 0), found.state(last, 0)
    assert bounds is not None
    return along(bounds, state.factors[0])


def test_zero_row_is_its_bias_for_unbounded_inputs() -> None:
    weight = np.ones((3, 4), np.float32)
    weight[:, 1] = weight[:, 2] = 0
    bias = np.array([1, 0.3, -2, 4], np.float32)
    program = dense(weight, bias, "Relu")
    low, high = hidden(program, find_intervals(program.model, program.analysis))
    assert low.tolist() == [0, np.float32(0.3), 0, 0]
    assert high.tolist() == [np.inf, np.float32(0.3), 0, np.inf]


def test_a_tiny_weight_is_no_zero() -> None:
    weight = np.zeros((3, 4), np.float32)
    weight[0, 1] = 1e-30
    program = dense(weight, np.zeros(4, np.float32))
    low, high = hidden(program, find_intervals(program.model, program.analysis))
    assert low.tolist() == [0, -np.inf, 0, 0]
    assert high.tolist() == [0, np.inf, 0, 0]


def test_shut_relu_over_half_bounded_inputs() -> None:
    """Not above zero for all weights below zero over what is not negative, though that is unbounded."""
    net = Net("shut")
    h = net.relu(net.gemm(net.input("x", ["N", 3]), 3, 4))
    weight = -np.abs(net.normal((4, 5), 1.0))
    weight[0, 4] = 0.1
    h = net.relu(net.op("Gemm", h, net.const(weight), net.const(np.array([0, -1, 0, 0.5, -1], np.float32))))
    net.output(net.gemm(h, 5, 2), ["N", 2])
    program = analysed(net.model())
    _, high = hidden(program, find_intervals(program.model, program.analysis))
    assert high.tolist() == [0, 0, 0, pytest.approx(0.5), np.inf]


def test_padding_brings_zeros_in() -> None:
    bounds = {}
    for pad in (0, 1):
        net = Net("padded")
        x = net.op("Sigmoid", net.image(2))
        weight = net.const(np.ones((3, 2, 3, 3), np.float32))
        h = net.op("Conv", x, weight, kernel_shape=[3, 3], pads=[pad] * 4)
        h = net.op("Sub", h, net.const(np.full((1, 1, 1, 1), 100.0, np.float32)))
        net.classify(h, 3)
        program = analysed(net.model())
        found = find_intervals(program.model, program.analysis, {"x": (5.0, 6.0)})
        bounds[pad] = float(found.values[h].lo.min())
    assert bounds[0] == pytest.approx(18 / (1 + np.exp(-5)) - 100, abs=1e-3)
    assert bounds[1] == pytest.approx(-100, abs=1e-3)


def test_sum_over_a_dynamic_axis_has_no_bound_but_keeps_zero() -> None:
    net = Net("sum")
    h = net.op("Sigmoid", net.linear(net.input("x", ["N", "T", 3]), 3, 4))
    out = net.op("ReduceSum", h, net.const([1]), keepdims=0)
    net.output(net.gemm(out, 4, 2), ["N", 2])
    program = analysed(net.model())
    bounds = find_intervals(program.model, program.analysis).values[out]
    assert (bounds.lo == 0).all()
    assert np.isinf(bounds.hi).all()


def test_a_size_may_be_that_of_a_value_at_any_depth() -> None:
    """As U-Nets resize to the size of a skip, hundreds of nodes behind the input."""
    net = Net("intervals_deep")
    value = net.input("x", (2, 3))
    for _ in range(1200):
        value = net.op("Neg", value)
    net.output(net.op("Reshape", value, net.op("Shape", value)), (2, 3))
    program = analysed(net.model())
    found = find_intervals(program.model, program.analysis)
    assert not found.values[program.model.graph.outputs[0].name or ""].known


def test_parameters_that_a_caller_may_override_are_unknown() -> None:
    program = dense(np.zeros((3, 4), np.float32), np.ones(4, np.float32))
    proto = ir.to_proto(program.model)
    for tensor in proto.graph.initializer:
        if tensor.name.startswith("c_"):
            proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    again = analysed(proto)
    found, last = find_intervals(again.model, again.analysis), len(again.analysis.walk.nodes) - 1
    bounds = found.operand(last, 0)
    assert bounds is not None and np.isneginf(bounds.lo).all() and np.isposinf(bounds.hi).all()
    assert not found.state(last, 0).factors  # nothing of it is free either


# ---------------------------------------------------------------- arithmetic
@given(st.integers(0, 2**31))
def test_arithmetic_holds_for_samples(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.normal(size=(2, 2, 4, 5)) * 10 ** rng.uniform(-3, 3), axis=0).astype(np.float32)
    a, b = (Interval.of(ends[0, k], ends[1, k]) for k in range(2))
    x, y = (np.clip(ends[0, k] + rng.random((4, 5)) * (ends[1, k] - ends[0, k]), *ends[:, k]) for k in range(2))
    x, y = x.astype(np.float32), y.astype(np.float32)
    with np.errstate(all="ignore"):
        results = {add: x + y, multiply: x * y, divide: x / y}
    for function, result in results.items():
        made = function(a, b, SINGLE)
        assert ((made.lo <= result) & (result <= made.hi)).all()
    sizes = {"m": 4, "k": 5, "n": 4}
    for left, right, value in ((a, Interval.point(y), x @ y.T), (Interval.point(x), b, x @ y.T), (a, b, x @ y.T)):
        made = contract(left, right, ("m", "k"), ("n", "k"), ("m", "n"), sizes, SINGLE)
        assert ((made.lo <= value) & (value <= made.hi)).all()


def test_control_real_arithmetic_does_not_hold_rounded_sums(rng: np.random.Generator) -> None:
    """Negative control: without outward rounding, float32 results fall beside the exact ones."""
    x, y = (rng.normal(size=(30, 40)).astype(np.float32) for _ in range(2))
    sizes = {"m": 30, "k": 40, "n": 30}
    real = contract(Interval.point(x), Interval.point(y), ("m", "k"), ("n", "k"), ("m", "n"), sizes, REAL)
    assert not ((real.lo <= x @ y.T) & (x @ y.T <= real.hi)).all()


def test_unbounded_times_zero_is_zero() -> None:
    free, zero = Interval.unbounded(1), Interval.point(np.zeros(1))
    assert multiply(free, zero, SINGLE).zero.all()
    assert np.isinf(divide(Interval.point(np.ones(1)), Interval.of(-np.ones(1), np.ones(1)), SINGLE).hi).all()


def test_a_slice_of_nothing_bounds_nothing() -> None:
    """As exporters write partial rotary embeddings whose rest is empty."""
    net = Net("intervals_empty")
    x = net.input("x", ("n", 4))
    h = net.op("Relu", net.op("MatMul", x, net.weight((4, 6), 4)))
    ends = [net.const(np.array([k], np.int64)) for k in (6, 6, 1)]
    empty = net.op("Slice", h, ends[0], ends[1], ends[2])
    whole = net.op("Concat", h, net.op("Mul", empty, net.const(np.float32(-1.0))), axis=1)
    net.output(net.op("MatMul", whole, net.weight((6, 2), 6)), ("n", 2))
    program = analysed(net.model())
    found = find_intervals(program.model, program.analysis)
    feeds = {"x": np.random.default_rng(0).standard_normal((5, 4), np.float32)}
    assert not outside(program, found, feeds)
    assert (found.values[whole].lo >= 0).all()
