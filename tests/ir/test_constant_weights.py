"""Weights in Constant nodes: every pass does what it does to initializers, and a file keeps its Constants."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests import zoo

import cipm_ir

DATA = {"x": np.random.default_rng(0).standard_normal((128, 8)).astype(np.float32)}


def net(*, constant: bool, ir_version: int = 9, form: str = "value") -> onnx.ModelProto:
    """Two products with a Relu between them."""
    rng = np.random.default_rng(1)
    shapes = {"w": (8, 32), "b": (32,), "v": (32, 4), "d": (4,)}
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    nodes, inits = [], []
    for name, array in arrays.items():
        if constant and form == "value_floats" and array.ndim == 1:
            nodes.append(helper.make_node("Constant", [], [name], value_floats=array.tolist()))
        elif constant:
            nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name)))
        else:
            inits.append(numpy_helper.from_array(array, name))
    nodes += [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "v", "d"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])]
    if ir_version < 4:
        inputs += [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.dims) for t in inits]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, inits)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=ir_version)


def ran(model: Any) -> np.ndarray:
    proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return zoo.run(proto, DATA)[0]


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


PASSES = [
    "prune{macs=0.5}",
    "prune{macs=0.5, importance=wanda}",
    "prune{macs=0.5, compensate=true}",
    "compress{macs=0.5}",
    "fold{ratio=0.5}",
    "canonicalize",
    "canonicalize-signs",
    "equalize",
    "cluster",
    "rotate",
    "remove-dead{never_firing=true}",
    "absorb-bias{observed=true, quantile=0.1}",
]


@pytest.mark.parametrize("ir_version", [3, 9])
@pytest.mark.parametrize("spec", PASSES)
def test_a_pass_does_the_same_to_constants(spec: str, ir_version: int) -> None:
    """The same summary and the same numbers, bit for bit."""
    results = [cipm_ir.optimize(net(constant=c, ir_version=ir_version), [spec], data=DATA) for c in (True, False)]
    steps = [r.report.steps[0] for r in results]
    said = [step.summary.partition("; a run takes")[0] for step in steps]  # what is measured in seconds differs
    assert said[0] == said[1]
    assert steps[0].changed == steps[1].changed
    a, b = (ran(r.program.emit()) for r in results)
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("form", ["value", "value_floats"])
@pytest.mark.parametrize("spec", ["canonicalize", "equalize"])
def test_constants_stay_constants_while_the_structure_does(spec: str, form: str) -> None:
    model = net(constant=True, form=form)
    result = cipm_ir.optimize(model, [spec], data=DATA)
    assert result.report.steps[0].changed
    made = result.program.emit()
    assert kinds(made) == [node.op_type for node in model.graph.node]
    assert not made.graph.initializers
    np.testing.assert_allclose(ran(made), ran(model), rtol=1e-5, atol=1e-5)


def test_untouched_constants_are_given_back_as_they_were() -> None:
    model = net(constant=True)
    assert ir.to_proto(cipm_ir.load(model).emit()).graph.node == model.graph.node


def test_a_constant_that_is_an_output_is_left_alone() -> None:
    model = net(constant=True)
    model.graph.output.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [32]))
    program = cipm_ir.load(model)
    assert "b" not in program.model.graph.initializers and "w" in program.model.graph.initializers
    assert [
        o.name
        for o in program.act({s: s.random(np.random.default_rng(0)) for s in program.spaces}).emit().graph.outputs
    ] == ["y", "b"]


def test_a_constant_that_a_subgraph_reads() -> None:
    """It is lifted for both graphs at once."""
    model = net(constant=True)
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["r", "v"], ["o"])],
        "t",
        [],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Gemm", ["r", "v", "d"], ["p"])],
        "e",
        [],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, None)],
    )
    model.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=other))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "c"))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 4]))
    program = cipm_ir.load(model)
    moved = program.act({s: s.random(np.random.default_rng(0)) for s in program.spaces})
    proto = ir.to_proto(moved.emit())
    for a, b in zip(zoo.run(model, DATA), zoo.run(proto, DATA), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_different_constant_is_found_out() -> None:
    """Control: the comparison of outputs sees one changed entry."""
    model = net(constant=True)
    changed = net(constant=True)
    array = numpy_helper.to_array(changed.graph.node[2].attribute[0].t).copy()
    array[0, 0] += 1.0
    changed.graph.node[2].attribute[0].t.CopyFrom(numpy_helper.from_array(array, "v"))
    assert np.abs(ran(model) - ran(changed)).max() > 1e-3


def corner(kind: str) -> onnx.ModelProto:
    """The net with its first weight behind something: a function, a cast, a dequantization, a second use."""
    model = net(constant=True)
    graph, (w, b, _, _) = model.graph, list(model.graph.node)[:4]
    array = numpy_helper.to_array(w.attribute[0].t)
    if kind == "in a function":
        nodes = [w, b, helper.make_node("Gemm", ["a", "w", "b"], ["o"])]
        imports = [helper.make_opsetid("", 13)]
        model.functions.append(helper.make_function("local", "First", ["a"], ["o"], nodes, imports))
        model.opset_import.append(helper.make_opsetid("local", 1))
        graph.node[4].CopyFrom(helper.make_node("First", ["x"], ["h"], domain="local"))
        del graph.node[:2]
    elif kind == "cast":
        half = numpy_helper.from_array(array.astype(np.float16), "q")
        graph.node[0].CopyFrom(helper.make_node("Constant", [], ["q"], value=half))
        graph.node.insert(1, helper.make_node("Cast", ["q"], ["w"], to=TensorProto.FLOAT))
    elif kind == "dequantized":
        whole = numpy_helper.from_array(np.rint(array * 40).astype(np.int8), "q")
        graph.node[0].CopyFrom(helper.make_node("Constant", [], ["q"], value=whole))
        graph.node.insert(1, helper.make_node("Constant", [], ["s"], value_float=0.025))
        graph.node.insert(2, helper.make_node("DequantizeLinear", ["q", "s"], ["w"]))
    else:
        graph.node[5].output[0] = "r1"
        graph.node.insert(6, helper.make_node("Mul", ["r1", "b"], ["r"]))
    return model


@pytest.mark.parametrize("kind", ["in a function", "cast", "dequantized", "used twice"])
def test_corners(kind: str) -> None:
    model = corner(kind)
    program = cipm_ir.load(model)
    assert sorted(space.size for space in program.spaces) == [32]
    moves = {s: s.random(np.random.default_rng(0), power_of_two=True) for s in program.spaces}
    moved = program.act(moves).emit()
    np.testing.assert_allclose(ran(moved), ran(model), rtol=1e-4, atol=1e-4)
    half = cipm_ir.optimize(model, ["prune{macs=0.5}"]).program
    assert sorted(space.size for space in half.spaces) == [16]
    ran(half.emit())
