"""Folding of constant scales and shifts into products: what goes, what stays, and that the function stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto
from tests.models.cleaning import Array, model, node, operators, run, value

from cipm_ir.passes.exact.affine.fold_affine import FoldAffine
from cipm_ir.passes.framework.base import Context, PassResult
from cipm_ir.passes.framework.pipeline import run_passes
from cipm_ir.symmetry.program import Program

RNG = np.random.default_rng(0)
IMAGE, ROWS, TOKENS = ("N", 4, 5, 5), ("N", 4), ("N", 3, 4)


def drawn(*shape: int) -> Array:
    """Entries away from 0."""
    signs: Array = RNG.choice([-1.0, 1.0], shape)
    return np.asarray(signs * (RNG.random(shape) + 0.5)).astype("float32")


def built(nodes: list[onnx.NodeProto], constants: dict[str, Array], shape: tuple[Any, ...] = IMAGE) -> onnx.ModelProto:
    return model(nodes, constants, inputs=[value("x", shape=shape)])


def folded(proto: onnx.ModelProto) -> PassResult:
    return FoldAffine().run(Program.of(ir.from_proto(proto)), Context())


def left(proto: onnx.ModelProto) -> list[str]:
    """The operators after folding; the function is the same up to a few units in the last place."""
    result = folded(proto)
    made = ir.to_proto(result.program.emit())
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    feeds = {"x": drawn(*(dim.dim_value or 2 for dim in dims))}
    for a, b in zip(run(proto, feeds), run(made, feeds), strict=True):
        assert a.shape == b.shape and np.abs(a - b).max() <= 1e-5 * np.abs(a).max()
    if not result.changed:
        assert operators(made) == operators(proto)
    return operators(made)


CONV = node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1])
WEIGHTS = {"w": drawn(6, 4, 3, 3)}
MATRIX = {"w": drawn(4, 6)}


@pytest.mark.parametrize("op", ["Mul", "Add", "Sub", "Div"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1), (6, 1, 1), (1, 6, 1, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_behind_a_convolution(op: str, shape: tuple[int, ...], bias: bool) -> None:
    conv = node("Conv", ["x", "w", "b"] if bias else ["x", "w"], ["a"], pads=[1, 1, 1, 1])
    constants = WEIGHTS | {"c": drawn(*shape)} | ({"b": drawn(6)} if bias else {})
    assert left(built([conv, node(op, ["a", "c"], ["y"])], constants)) == ["Conv"]
    turned = left(built([conv, node(op, ["c", "a"], ["y"])], constants))
    assert turned == (["Conv", "Div"] if op == "Div" else ["Conv"])  # c / y is no scale of y


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_both_sides_of_grouped_convolutions(op: str, group: int) -> None:
    shape = (6, 4 // group, 3, 3) if op == "Conv" else (4, 6 // group, 3, 3)
    product = node(op, ["b", "w"], ["a"], group=group)
    nodes = [node("Mul", ["x", "c"], ["b"]), product, node("Neg", ["a"], ["d"]), node("Mul", ["d", "e"], ["y"])]
    constants = {"w": drawn(*shape), "c": drawn(4, 1, 1), "e": drawn(6, 1, 1)}
    assert left(built(nodes, constants)) == [op]


@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 1, 1, 1]])
def test_a_shift_in_front_goes_where_nothing_is_padded(pads: list[int]) -> None:
    nodes = [node("Add", ["x", "c"], ["b"]), node("Conv", ["b", "w"], ["y"], pads=pads)]
    assert left(built(nodes, WEIGHTS | {"c": drawn(4, 1, 1)})) == (["Add", "Conv"] if any(pads) else ["Conv"])
    transposed = [node("Add", ["x", "c"], ["b"]), node("ConvTranspose", ["b", "w"], ["y"])]
    assert left(built(transposed, {"w": drawn(4, 6, 3, 3), "c": drawn(4, 1, 1)})) == ["Add", "ConvTranspose"]
    same = [node("Add", ["x", "c"], ["b"]), node("Conv", ["b", "w"], ["y"], auto_pad="SAME_UPPER")]
    assert left(built(same, WEIGHTS | {"c": drawn(4, 1, 1)})) == ["Add", "Conv"]


@pytest.mark.parametrize("attributes", [{}, {"alpha": 0.5, "beta": 3.0}, {"transB": 1}])
@pytest.mark.parametrize("bias", [False, True])
def test_both_sides_of_a_gemm(attributes: dict[str, Any], bias: bool) -> None:
    product = node("Gemm", ["f", "w", "b"] if bias else ["f", "w"], ["a"], **attributes)
    nodes = [node("Mul", ["x", "c"], ["e"]), node("Add", ["e", "d"], ["f"]), product]
    nodes += [node("Sub", ["g", "a"], ["h"]), node("Div", ["h", "i"], ["y"])]
    constants = {"w": drawn(6, 4) if "transB" in attributes else drawn(4, 6), "c": drawn(4), "d": drawn(1, 4)}
    constants |= {"g": drawn(6), "i": drawn()} | ({"b": drawn(6)} if bias else {})
    assert left(built(nodes, constants, ROWS)) == ["Gemm"]


def test_a_product_of_matrices_takes_a_bias() -> None:
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Add", ["a", "c"], ["y"])]
    assert left(built(nodes, MATRIX | {"c": drawn(6)}, ROWS)) == ["Gemm"]
    assert left(built(nodes, MATRIX | {"c": drawn(1, 6)}, ROWS)) == ["Gemm"]
    # Gemm takes two axes, MatMul any number; a constant of more axes makes the result larger.
    assert left(built(nodes, MATRIX | {"c": drawn(6)}, TOKENS)) == ["MatMul", "Add"]
    assert left(built(nodes, MATRIX | {"c": drawn(1, 1, 6)}, ROWS)) == ["MatMul", "Add"]
    scaled = [node("MatMul", ["x", "w"], ["a"]), node("Mul", ["a", "c"], ["y"])]
    assert left(built(scaled, MATRIX | {"c": drawn(6)}, TOKENS)) == ["MatMul"]
    assert left(built(scaled, MATRIX | {"c": drawn(3, 1)}, TOKENS)) == ["MatMul", "Mul"]


@pytest.mark.parametrize("shape", [(5,), (5, 1), (6, 5, 1), (2, 6, 1, 1), (1, 1, 1, 1, 1)])
def test_constants_that_are_not_one_number_for_each_channel_stay(shape: tuple[int, ...]) -> None:
    constants = WEIGHTS | {"c": drawn(*shape)}
    assert left(built([CONV, node("Mul", ["a", "c"], ["y"])], constants)) == ["Conv", "Mul"]


def test_one_channel_that_a_constant_spreads_stays() -> None:
    constants = {"w": drawn(1, 4, 3, 3), "c": drawn(6, 1, 1)}
    assert left(built([CONV, node("Add", ["a", "c"], ["y"])], constants)) == ["Conv", "Add"]


def test_what_something_else_reads_stays() -> None:
    shown = [CONV, node("Mul", ["a", "c"], ["b"]), node("Add", ["a", "b"], ["y"])]
    assert left(built(shown, WEIGHTS | {"c": drawn()})) == ["Conv", "Mul", "Add"]
    constants = {"w": drawn(4, 4, 1, 1), "c": drawn()}
    shared = [node("Conv", ["x", "w"], ["a"]), node("Mul", ["a", "c"], ["b"]), node("Conv", ["b", "w"], ["y"])]
    assert left(built(shared, constants)) == ["Conv", "Mul", "Conv"]
    outputs = [value("a", shape=None), value("y", shape=None)]
    proto = model(
        [CONV, node("Mul", ["a", "c"], ["y"])],
        WEIGHTS | {"c": drawn()},
        inputs=[value("x", shape=IMAGE)],
        outputs=outputs,
    )
    assert not folded(proto).changed


def test_overridable_and_computed_constants_stay() -> None:
    proto = built([CONV, node("Mul", ["a", "c"], ["y"])], WEIGHTS | {"c": drawn()})
    assert folded(proto).changed
    for name, shape in (("c", ()), ("w", (6, 4, 3, 3))):
        listed = onnx.ModelProto()
        listed.CopyFrom(proto)
        listed.graph.input.append(value(name, TensorProto.FLOAT, shape))
        assert not folded(listed).changed


def test_an_epsilon_is_not_lost_in_a_bias() -> None:
    """Conv + 1e-10 in front of a logarithm must not become 0 where bias and products cancel."""
    conv = node("Conv", ["x", "w", "b"], ["a"])
    nodes = [conv, node("Add", ["a", "c"], ["y"])]
    tiny = {"w": drawn(6, 4, 1, 1), "c": np.array(1e-10, "float32")}
    assert left(built(nodes, tiny | {"b": drawn(6)})) == ["Conv", "Add"]
    assert left(built(nodes, tiny | {"b": np.zeros(6, "float32")})) == ["Conv"]


@pytest.mark.parametrize("number", [0.0, 1e38])
def test_numbers_that_the_weights_cannot_take(number: float) -> None:
    """Division by zero, and weights that overflow."""
    op = "Mul" if number else "Div"
    proto = built([CONV, node(op, ["a", "c"], ["y"])], {"w": 16 * drawn(6, 4, 3, 3), "c": np.array(number, "float32")})
    assert not folded(proto).changed


def test_normalizations_in_front_of_a_product() -> None:
    names = ("scale", "shift", "mean", "var")
    constants = {name: np.abs(drawn(4)) for name in names}
    norm = node("BatchNormalization", ["x", *names], ["b"])
    assert left(built([norm, node("Conv", ["b", "w"], ["y"])], WEIGHTS | constants)) == ["Conv"]
    padded = [norm, node("Conv", ["b", "w"], ["y"], pads=[1, 1, 1, 1])]
    assert left(built(padded, WEIGHTS | constants)) == ["BatchNormalization", "Conv"]
    assert left(built([norm, node("Gemm", ["b", "w"], ["y"])], MATRIX | constants, ROWS)) == ["Gemm"]
    # Of three axes, a normalization takes the middle one and a product the last.
    square = {"w": drawn(4, 6)} | {name: np.abs(drawn(4)) for name in names}
    middle = [norm, node("MatMul", ["b", "w"], ["y"])]
    assert left(built(middle, square, ("N", 4, 4))) == ["BatchNormalization", "MatMul"]


def test_the_pipeline_agrees_and_no_units_are_lost() -> None:
    nodes = [CONV, node("Mul", ["a", "c"], ["d"]), node("Relu", ["d"], ["e"]), node("Conv", ["e", "v"], ["f"])]
    nodes.append(node("Add", ["f", "g"], ["y"]))
    program = Program.of(
        ir.from_proto(built(nodes, WEIGHTS | {"c": drawn(6, 1, 1), "v": drawn(3, 6, 1, 1), "g": drawn(3, 1, 1)}))
    )
    outcome = run_passes(program, "fold-affine")
    assert outcome.report.verification and "2 scales and shifts" in outcome.report.steps[0].summary
    assert [s.size for s in outcome.program.spaces] == [s.size for s in program.spaces] == [6]
    assert outcome.program.macs == program.macs
