"""Models with QuantizeLinear and DequantizeLinear: which scalings they admit, and that no integer ever changes.

Powers of two with signs must not change a bit. So must permutations where every scale of quantization is itself a power
of two: all sums are exact in float32 then, in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from tests.benchmarks.compress_cifar import prepared
from tests.models.quantized_models import (
    convolutions,
    feeds,
    perceptron,
    separable,
    static,
    weights_only,
    whole_numbers,
)
from tests.zoo.net import Net

import cipm_ir
from cipm_ir.algebra import Element
from cipm_ir.ir.labels import Factor
from cipm_ir.ops import quantized
from cipm_ir.ops.context import OpContext
from cipm_ir.runtime.session import run
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

Array = NDArray[Any]
FLOAT_WEIGHTS = {"AddQDQPairToWeight": True}
"""Weights stay float and pass a pair themselves, as quantization-aware training exports them."""


def program_of(model: onnx.ModelProto) -> Program:
    return Program.of(ir.from_proto(model))


def scalable(program: Program) -> list[int]:
    """Sizes of the spaces with a direction of scaling, by direction."""
    return sorted(s.size for s in program.spaces for _ in range(s.group.scales))


def gauge(program: Program, *, permute: bool = False, seed: int = 0) -> dict[Space, Element]:
    """Random powers of two on all spaces, in their order unless they are to be exchanged too."""
    rng, chosen = np.random.default_rng(seed), {}
    for space in program.spaces:
        element = space.random(rng, power_of_two=True)
        order = element.perm if permute else np.arange(space.size)
        chosen[space] = Element(order, element.scale, element.sign)
    return chosen


def outputs(model: onnx.ModelProto, inputs: dict[str, Array]) -> list[Array]:
    return list(run(ir.from_proto(model), inputs).values())


def parameters(model: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def check_gauge(model: onnx.ModelProto, inputs: dict[str, Array], *, permute: bool = False) -> None:
    """A random element changes parameters and no bit of the outputs; every integer stays what it is."""
    program = program_of(model)
    moved = ir.to_proto(program.act(gauge(program, permute=permute)).emit())
    before, after = parameters(model), parameters(moved)
    assert before.keys() == after.keys(), "no tensor is forked"
    changed = {name for name, array in before.items() if not np.array_equal(array, after[name])}
    assert changed or not (permute or scalable(program))
    if not permute:
        assert all(before[name].dtype.kind == "f" for name in changed)
    for name in changed:
        assert np.array_equal(np.sort(before[name], axis=None), np.sort(after[name], axis=None)) or (
            before[name].dtype.kind == "f"
        )
    for a, b in zip(outputs(model, inputs), outputs(moved, inputs), strict=True):
        assert np.array_equal(a, b)


def check_close(model: onnx.ModelProto, moved: onnx.ModelProto, inputs: dict[str, Array]) -> None:
    """Where no activation is rounded, other elements are exact up to the order of sums."""
    for a, b in zip(outputs(model, inputs), outputs(moved, inputs), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()


# ---------------------------------------------------------------- what onnxruntime writes
Build = Callable[[], onnx.ModelProto]
CASES: list[tuple[str, Build, dict[str, Any], bool, list[int]]] = [
    # Activations have one scale per tensor: nothing scales, whatever the weights have.
    ("conv_per_tensor", convolutions, {}, False, []),
    ("conv_per_channel", convolutions, {"per_channel": True}, False, []),
    ("mlp_per_channel", perceptron, {"per_channel": True}, False, []),
    ("float_weights", convolutions, {"per_channel": True, "extra": FLOAT_WEIGHTS}, False, []),
    # Weights alone: a channel's scales are those of the layer that makes it; the one that reads it has none,
    ("conv_weights", convolutions, {"per_channel": True}, True, []),
    # unless it is depthwise.
    ("separable_weights", separable, {"per_channel": True}, True, [6]),
    ("separable_weights_per_tensor", separable, {}, True, []),
    ("separable_float_weights", separable, {"per_channel": True, "extra": FLOAT_WEIGHTS}, True, [6]),
]


def quantized_model(build: Build, options: dict[str, Any], bare: bool) -> tuple[onnx.ModelProto, dict[str, Array]]:
    model = build()
    data = feeds(model)
    made = static(model, data, **options)
    return (weights_only(made) if bare else made), data[0]


@pytest.mark.parametrize(("build", "options", "bare", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_static_quantization(build: Build, options: dict[str, Any], bare: bool, expected: list[int]) -> None:
    model, inputs = quantized_model(build, options, bare)
    program = program_of(model)
    assert scalable(program) == expected
    assert sorted(s.size for s in program.spaces) == sorted(s.size for s in program_of(build()).spaces)
    assert not program.opaque
    check_gauge(model, inputs)
    if bare:
        moved = program.act({s: s.random(np.random.default_rng(1)) for s in program.spaces})
        check_close(model, ir.to_proto(moved.emit()), inputs)
    else:
        check_gauge(whole_numbers(model), inputs, permute=True)


def mixed(model: onnx.ModelProto, left_out: list[str]) -> onnx.ModelProto:
    """Per channel, some layers left in float, and nothing quantized behind what computes."""
    extra = {"OpTypesToExcludeOutputQuantization": ["Conv", "Gemm", "MatMul", "Relu", "Add"]}
    return static(model, feeds(model), per_channel=True, exclude=left_out, extra=extra)


@pytest.mark.parametrize(("build", "expected"), [(convolutions, [6]), (perceptron, [12])])
def test_mixed_precision(build: Build, expected: list[int]) -> None:
    """The second layer is left in float: its input takes up what the scales of the first one's weight and bias give."""
    model = build()
    second = [n.name for n in model.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")][1]
    made = mixed(model, [second])
    program = program_of(made)
    assert scalable(program) == expected
    members = next(s for s in program.spaces if s.group.scales).members
    assert sum("scale" in name for name in members) == 2, "those of weight and bias, separate parameters"
    check_gauge(made, feeds(model)[0])
    check_gauge(whole_numbers(made), feeds(model)[0])


@pytest.fixture(scope="module")
def resnet(data_dir: Path) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """ResNet-20 and eight images."""
    model = onnx.load(data_dir / "cifar10" / "resnet20.onnx")
    images = prepared(np.load(data_dir / "cifar10" / "val.npz")["images"][:8])
    return model, {model.graph.input[0].name: images}


@pytest.mark.parametrize("per_channel", [False, True])
def test_resnet20(resnet: tuple[onnx.ModelProto, dict[str, Array]], per_channel: bool) -> None:
    model, inputs = resnet
    made = static(model, [inputs], per_channel=per_channel)
    program = program_of(made)
    assert scalable(program) == [] and not program.opaque
    assert [s.size for s in program.spaces] == [s.size for s in program_of(model).spaces]
    check_gauge(whole_numbers(made), inputs, permute=True)


def test_resnet20_with_float_layers(resnet: tuple[onnx.ModelProto, dict[str, Array]]) -> None:
    """The second convolution of every block in float: all nine inner spaces scale."""
    model, inputs = resnet
    names = [n.name for n in model.graph.node if n.op_type == "Conv"]
    extra = {"OpTypesToExcludeOutputQuantization": ["Conv", "Relu"]}
    made = static(model, [inputs], per_channel=True, exclude=names[2::2], extra=extra)
    assert scalable(program_of(made)) == [16] * 3 + [32] * 3 + [64] * 3
    check_gauge(made, inputs)


# ---------------------------------------------------------------- pairs and single nodes, written by hand
def scales(net: Net, size: int) -> str:
    return net.const(net.rng.uniform(0.01, 0.03, size).astype(np.float32), "scale")


def points(net: Net, size: int, low: int = 0, high: int = 1, dtype: Any = np.int8) -> str:
    return net.const(net.rng.integers(low, high, size).astype(dtype), "zero_point")


def read(net: Net, h: str, width: int = 6) -> tuple[onnx.ModelProto, dict[str, Array]]:
    net.output(net.gemm(h, width, 3), ["N", 3])
    model = net.model()
    return model, feeds(model)[0]


def activations(shared: bool) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A fake quantization of activations per unit, its scales one tensor or two equal ones."""
    net = Net("activations")
    h = net.relu(net.gemm(net.input("x", ["N", 5]), 5, 6))
    s, z = scales(net, 6), points(net, 6, -20, 20)
    again = s if shared else net.const(numpy_helper.to_array(net.initializers[-2]), "scale")
    y = net.op("DequantizeLinear", net.op("QuantizeLinear", h, s, z, axis=1), again, z, axis=1)
    return read(net, y)


@pytest.mark.parametrize("shared", [True, False])
def test_a_pair_keeps_equal_scales(shared: bool) -> None:
    model, inputs = activations(shared)
    program = program_of(model)
    assert scalable(program) == [6]
    check_gauge(model, inputs)
    moved = parameters(ir.to_proto(program.act(gauge(program, permute=True)).emit()))
    old, new = parameters(model), [array for name, array in moved.items() if name.startswith("scale")]
    assert len(new) == (1 if shared else 2) and all(np.array_equal(new[0], array) for array in new)
    assert not np.array_equal(new[0], next(array for name, array in old.items() if name.startswith("scale")))


def requantized() -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Integers made with some scales and read with others: the two sides scale by themselves."""
    net = Net("requantized")
    h = net.relu(net.gemm(net.input("x", ["N", 5]), 5, 6))
    z = points(net, 6, -20, 20)
    y = net.op("QuantizeLinear", h, scales(net, 6), z, axis=1)
    return read(net, net.op("DequantizeLinear", y, scales(net, 6), z, axis=1))


def test_different_scales_decouple() -> None:
    model, inputs = requantized()
    assert scalable(program_of(model)) == [6, 6]
    check_gauge(model, inputs)


def integers_are_an_output() -> tuple[onnx.ModelProto, dict[str, Array]]:
    """As `activations`, with the integers given out as well, unit by unit: nothing moves."""
    model, inputs = activations(True)
    name = next(n.output[0] for n in model.graph.node if n.op_type == "QuantizeLinear")
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT8, ["N", 6]))
    return model, inputs


def test_integers_that_leave_the_graph_are_fixed() -> None:
    model, inputs = integers_are_an_output()
    assert not [s for s in program_of(model).spaces]
    assert len(outputs(model, inputs)) == 2


def test_scales_along_the_inputs_of_a_weight() -> None:
    """A weight with one scale per input: it is its inputs that scale, and a float layer before it follows."""
    net = Net("by_inputs")
    h = net.relu(net.gemm(net.input("x", ["N", 5]), 5, 6))
    w = net.const(net.rng.integers(-127, 128, (6, 7)).astype(np.int8), "w")
    h = net.op("MatMul", h, net.op("DequantizeLinear", w, scales(net, 6), points(net, 6), axis=0))
    model, inputs = read(net, net.op("Sigmoid", h), 7)
    program = program_of(model)
    assert scalable(program) == [6] and sorted(s.size for s in program.spaces) == [6, 7]
    check_gauge(model, inputs)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_zero_points_stay(dtype: Any) -> None:
    net = Net("zero_points")
    w = net.const(net.rng.integers(0, 120, (6, 5)).astype(dtype), "w")
    weight = net.op("DequantizeLinear", w, scales(net, 6), points(net, 6, 40, 80, dtype), axis=0)
    h = net.relu(net.op("Gemm", net.input("x", ["N", 5]), weight, net.bias(6), transB=1))
    model, inputs = read(net, h)
    assert scalable(program_of(model)) == [6]
    check_gauge(model, inputs)


def test_signs_stay() -> None:
    """Behind a linear layer signs would be free, but no runtime expects negative scales."""
    net = Net("linear")
    w = net.const(net.rng.integers(-127, 128, (6, 5)).astype(np.int8), "w")
    weight = net.op("DequantizeLinear", w, scales(net, 6), points(net, 6), axis=0)
    model, _ = read(net, net.op("Gemm", net.input("x", ["N", 5]), weight, transB=1))
    (space,) = program_of(model).spaces
    assert space.group.name == "R>0 wr S(6)"


def test_canonical_form_of_a_quantized_model() -> None:
    """Models of one orbit become equal; the integers only change places."""
    model, inputs = quantized_model(separable, {"per_channel": True}, True)
    program = program_of(model)
    moved = program.act(gauge(program, permute=True, seed=3))
    first, second = (cipm_ir.optimize(p, ["canonicalize"]).program for p in (program, moved))
    one, two = (parameters(ir.to_proto(p.emit())) for p in (first, second))
    assert all(np.array_equal(array, two[name]) for name, array in one.items())
    check_gauge(model, inputs)


def test_units_may_go() -> None:
    """Dropping a unit drops its scales and zero points; what only met zeros leaves the outputs as they are."""
    net = Net("dropped")
    h = net.input("x", ["N", 5])
    for k, (n, m) in enumerate(((5, 6), (6, 4))):
        w = net.rng.integers(-127, 128, (m, n)).astype(np.int8)
        if k:
            w[:, 2] = 0  # nothing reads the third unit
        weight = net.op("DequantizeLinear", net.const(w, "w"), scales(net, m), points(net, m), axis=0)
        h = net.relu(net.op("Gemm", h, weight, net.bias(m), transB=1))
    model, inputs = read(net, h, 4)
    program = program_of(model)
    space = next(s for s in program.spaces if s.size == 6)
    small = ir.to_proto(program.restrict({space: [0, 1, 3, 4, 5]}).emit())
    onnx.checker.check_model(small, full_check=True)
    assert sorted(a.shape for a in parameters(small).values()) != sorted(a.shape for a in parameters(model).values())
    assert np.allclose(outputs(model, inputs)[0], outputs(small, inputs)[0], rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- controls
def forgotten(op: OpContext, f: Factor, steps: Factor) -> Factor:
    """As if an axis could be scaled without its scales of quantization."""
    op.freeze_factor(steps)
    return f


def inverted(op: OpContext, f: Factor, steps: Factor) -> Factor:
    """As if the scales had to be divided."""
    op.rec.equate(f.labels, ((f.scale_var, 1), (steps.scale_var, 1)))
    return Factor(f.axes, f.labels, f.scale_var, f.repeats)


@pytest.mark.parametrize("rule", [forgotten, inverted])
def test_a_wrong_equation_is_caught(monkeypatch: pytest.MonkeyPatch, rule: Any) -> None:
    model, inputs = activations(True)
    check_gauge(model, inputs)
    monkeypatch.setattr(quantized, "_scaled", rule)
    assert scalable(program_of(model))
    with pytest.raises(AssertionError):
        check_gauge(model, inputs)
