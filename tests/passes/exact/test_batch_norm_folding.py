"""Folding of batch normalizations: weights rounded once, in every type; what cannot be folded stays, with a reason."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from tests import zoo
from tests.models.cleaning import Array, model, node, run, value

from cipm_ir.passes.exact.affine.batch_norm import round_once
from cipm_ir.passes.exact.cleanup.clean_up import FoldBatchNorm
from cipm_ir.passes.framework.base import Context, PassResult
from cipm_ir.symmetry.program import Program

RNG = np.random.default_rng(0)
NORM = ("scale", "shift", "mean", "var")


def parameters(n: int, dtype: Any = "float32") -> dict[str, Array]:
    made = {name: RNG.standard_normal(n).astype(dtype) for name in NORM}
    made["var"] = (RNG.random(n) + 0.5).astype(dtype)
    return made


def weights(*shape: int, dtype: Any = "float32") -> Array:
    return RNG.standard_normal(shape).astype(dtype)


def norm(x: str = "a", y: str = "y", **attributes: Any) -> onnx.NodeProto:
    return node("BatchNormalization", [x, *NORM], [y], **attributes)


def built(
    nodes: list[onnx.NodeProto], constants: dict[str, Array], *, elem: int = TensorProto.FLOAT, **given: Any
) -> onnx.ModelProto:
    image = [value("x", elem, ("N", 4, 5, 5))]
    return model(nodes, constants, **{"inputs": image, "outputs": [value("y", elem, None)], **given})


def folded(proto: onnx.ModelProto) -> PassResult:
    return FoldBatchNorm().run(Program.of(ir.from_proto(proto)), Context())


def tensors(result: PassResult) -> dict[str, Array]:
    found = result.program.model.graph.initializers
    return {name: np.asarray(v.const_value.numpy()) for name, v in found.items() if v.const_value is not None}


def agrees(proto: onnx.ModelProto, shape: tuple[int, ...] = (2, 4, 5, 5)) -> bool:
    """The folded model has no normalization left and computes the same to a few units in the last place of float32."""
    result = folded(proto)
    assert result.changed and "BatchNormalization" not in [n.op_type for n in result.program.model.graph]
    feeds = {"x": weights(*shape)}
    (before,), (after,) = run(proto, feeds), run(ir.to_proto(result.program.emit()), feeds)
    return bool(np.abs(before - after).max() <= 1e-5 * np.abs(before).max())


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_convolutions(op: str, bias: bool, group: int) -> None:
    shape = (6, 4 // group, 3, 3) if op == "Conv" else (4, 6 // group, 3, 3)
    constants = {"w": weights(*shape), **parameters(6)} | ({"b": weights(6)} if bias else {})
    inputs = ["x", "w", "b"] if bias else ["x", "w"]
    nodes = [node(op, inputs, ["a"], group=group, pads=[1, 1, 1, 1], strides=[2, 1]), norm(epsilon=0.3)]
    assert agrees(built(nodes, constants))


@pytest.mark.parametrize("attributes", [{}, {"alpha": 0.5, "beta": 3.0}, {"transA": 1}, {"transB": 1, "beta": 0.0}])
@pytest.mark.parametrize("bias", [False, True])
def test_gemm(attributes: dict[str, Any], bias: bool) -> None:
    constants = {"w": weights(*((5, 4) if attributes.get("transB") else (4, 5))), **parameters(5)}
    constants |= {"b": weights(5)} if bias else {}
    shape = (4, "N") if attributes.get("transA") else ("N", 4)
    nodes = [node("Gemm", ["x", "w", "b"] if bias else ["x", "w"], ["a"], **attributes), norm()]
    proto = built(nodes, constants, inputs=[value("x", shape=shape)])
    assert agrees(proto, (4, 3) if attributes.get("transA") else (3, 4))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_weights_are_computed_in_double_precision_and_rounded_once(dtype: Any) -> None:
    """A control that rounds after each step, as arithmetic in the type itself does, gives other weights."""
    constants = {"w": weights(64, 4, 1, 1, dtype=dtype), **parameters(64, dtype)}
    elem = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    result = folded(built([node("Conv", ["x", "w"], ["a"]), norm(epsilon=1e-3)], constants, elem=elem))
    wide = {name: array.astype(np.float64) for name, array in constants.items()}
    factor = wide["scale"] / np.sqrt(wide["var"] + np.float64(np.float32(1e-3)))
    made = tensors(result)
    exact = wide["w"] * factor[:, None, None, None]
    assert made["w"].dtype == dtype and np.array_equal(made["w"], round_once(exact, ir.DataType(elem)))
    shift = wide["shift"] - wide["mean"] * factor
    assert np.array_equal(made["w.bias"], round_once(shift, ir.DataType(elem)))
    small = constants["scale"] / np.sqrt(constants["var"] + dtype(1e-3))
    if dtype is not np.float64:
        assert not np.array_equal(made["w"], constants["w"] * small[:, None, None, None])


def test_rounding_to_bfloat16_is_done_once() -> None:
    """1 + 2^-8 lies between two of them: what is above it goes up, however little; by float it would go down."""
    just_above = np.array([1 + 2.0**-8 + 2.0**-40, -1 - 2.0**-8 - 2.0**-40, 1 + 2.0**-8, 0.0, -0.0, 1e39, 2.0**-140])
    rounded = round_once(just_above, ir.DataType.BFLOAT16).astype(np.float64)
    assert rounded.tolist()[:3] == [1 + 2.0**-7, -1 - 2.0**-7, 1.0]
    assert rounded[3] == 0 and np.signbit(rounded[4]) and rounded[5] == np.inf and rounded[6] == 0.0
    assert just_above[:1].astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64) == 1.0
    draws = RNG.standard_normal(10000) * 2.0 ** RNG.integers(-20, 20, 10000)
    near = round_once(draws, ir.DataType.BFLOAT16).astype(np.float64)
    step = 2.0 ** (np.floor(np.log2(np.abs(draws))) - 7)
    assert (np.abs(near - draws) <= step / 2).all()


def test_half_weights_with_statistics_in_float() -> None:
    constants = {"w": weights(6, 4, 1, 1, dtype=np.float16), **parameters(6)}
    result = folded(built([node("Conv", ["x", "w"], ["a"]), norm()], constants, elem=TensorProto.FLOAT16, opset=15))
    assert result.changed and {array.dtype for array in tensors(result).values()} == {np.dtype(np.float16)}


CONV = node("Conv", ["x", "w"], ["a"])
SQUARE = weights(4, 4, 1, 1)


def kept(proto: onnx.ModelProto, why: str) -> None:
    program = Program.of(ir.from_proto(proto))
    result = FoldBatchNorm().run(program, Context())
    assert result.program is program and not result.changed
    assert why in result.summary and "kept" in result.summary
    assert result.metrics["left"] == 1 and sum(result.metrics["kept"].values()) == 1


def test_training() -> None:
    constants = {"w": SQUARE, **parameters(4)}
    train = node("BatchNormalization", ["a", *NORM], ["y", "m", "v"], training_mode=1)
    kept(built([CONV, train], constants), "training mode")
    old = node("BatchNormalization", ["a", *NORM], ["y", "m", "v", "sm", "sv"])
    kept(built([CONV, old], constants, opset=9), "training mode")
    kept(built([CONV, norm(is_test=1)], constants, opset=6), "training mode")
    kept(built([CONV, norm(spatial=0)], constants, opset=7), "every position")


def test_others_that_need_the_inner_value() -> None:
    constants = {"w": SQUARE, **parameters(4)}
    both = [CONV, norm(y="b"), node("Add", ["a", "b"], ["y"])]
    kept(built(both, constants), "consumed elsewhere")
    shown = [value("y", shape=None), value("a", shape=None)]
    kept(built([CONV, norm()], constants, outputs=shown), "consumed elsewhere")
    branch = [helper.make_graph([node("Neg", ["a"], [o])], o, [], [value(o, shape=None)]) for o in "tu"]
    inside = [CONV, norm(y="b"), node("If", ["c"], ["d"], then_branch=branch[0], else_branch=branch[1])]
    inputs = [value("x", shape=("N", 4, 5, 5)), value("c", TensorProto.BOOL, [])]
    kept(built([*inside, node("Add", ["b", "d"], ["y"])], constants, inputs=inputs), "consumed elsewhere")


def test_a_normalization_that_comes_first_or_alone() -> None:
    constants = {"w": SQUARE, **parameters(4)}
    before = [node("BatchNormalization", ["x", *NORM], ["a"]), node("Conv", ["a", "w"], ["y"], pads=[1, 1, 1, 1])]
    kept(built(before, constants), "nothing before")
    between = [CONV, node("Relu", ["a"], ["r"]), norm("r")]
    kept(built(between, constants), "nothing before")
    kept(built([node("MatMul", ["x", "m"], ["a"]), norm()], {"m": weights(5, 5), **parameters(4)}), "nothing before")


@pytest.mark.parametrize("taken", [True, False])
def test_a_normalization_in_a_branch(taken: bool) -> None:
    """The weights are the main graph's; what the other branch uses too stays for it."""
    constants = {"w": SQUARE, **parameters(4)}
    then = helper.make_graph([CONV, norm(y="t")], "then", [], [value("t", shape=None)])
    inputs = [value("x", shape=("N", 4, 5, 5)), value("c", TensorProto.BOOL, [])]
    for last in (node("Neg", ["x"], ["e"]), node("Conv", ["x", "w"], ["e"])):
        other = helper.make_graph([last], "else", [], [value("e", shape=None)])
        proto = built([node("If", ["c"], ["y"], then_branch=then, else_branch=other)], constants, inputs=inputs)
        result = folded(proto)
        assert result.metrics["folded"] == 1
        feeds = {"x": RNG.standard_normal((2, 4, 5, 5)).astype(np.float32), "c": np.array(taken)}
        before, after = zoo.run(proto, feeds)[0], zoo.run(ir.to_proto(result.program.emit()), feeds)[0]
        assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()


def test_bias_of_another_shape() -> None:
    for shape in ((1, 5), (1,), (), (3, 5)):
        constants = {"w": weights(4, 5), "b": weights(*shape), **parameters(5)}
        nodes = [node("Gemm", ["x", "w", "b"], ["a"]), norm()]
        kept(built(nodes, constants, inputs=[value("x", shape=(3, 4))]), "another shape")


@pytest.mark.parametrize(
    ("changes", "dtype", "why"),
    [
        ({"var": -1.0}, "float32", "do not fit"),
        ({"var": -1e-5}, "float32", "do not fit"),
        ({"var": 0.0, "scale": 60000.0}, "float16", "do not fit"),
        ({"var": 0.0, "scale": 3e38}, "float32", "do not fit"),
        ({"mean": np.inf}, "float32", "do not fit"),
        ({"shift": np.nan}, "float32", "do not fit"),
        ({"scale": 6e-8, "shift": 0.0, "mean": 0.0}, "float16", "too small"),
    ],
)
def test_weights_that_the_type_cannot_hold(changes: dict[str, float], dtype: str, why: str) -> None:
    """One channel is enough; nothing of the model is changed."""
    constants = {"w": SQUARE.astype(dtype), **parameters(4, dtype)}
    for name, number in changes.items():
        constants[name][2] = number
    elem = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    proto = built([CONV, norm()], constants, elem=elem)
    kept(proto, why)
    for name in changes:
        constants[name][2] = 1.0
    assert folded(built([CONV, norm()], constants, elem=elem)).changed  # the control


def test_a_dead_channel_does_not_stand_in_the_way() -> None:
    constants = {"w": SQUARE.copy(), **parameters(4)}
    constants["scale"][1] = 1e-38
    assert folded(built([CONV, norm()], constants)).changed


def test_the_epsilon_is_the_one_of_the_file() -> None:
    """A missing epsilon is 1e-5 in float; a variance of zero makes it count."""
    constants = {"w": np.ones((4, 4, 1, 1), np.float32), **parameters(4), "var": np.zeros(4, np.float32)}
    constants["scale"] = np.ones(4, np.float32)
    cases: list[tuple[dict[str, Any], float]] = [({}, 1e-5), ({"epsilon": 1e-3}, 1e-3), ({"epsilon": 1.0}, 1.0)]
    for attributes, epsilon in cases:
        made = tensors(folded(built([CONV, norm(**attributes)], constants)))["w"]
        assert np.array_equal(made, np.full_like(made, np.float32(1 / np.sqrt(np.float64(np.float32(epsilon))))))
