"""`restrict` where a size that changes is used as a number beyond the nodes: as an output, or inside a branch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tests.models.cleaning import Array, model, node, run, same_bits, value

import cipm_ir

INT = TensorProto.INT64
RNG = np.random.default_rng(3)
X = RNG.standard_normal((2, 3, 4, 4)).astype(np.float32)


def _branch(operator: str) -> onnx.GraphProto:
    made = f"{operator}_made"
    return helper.make_graph(
        [node(operator, ["s", "one"], [made])], operator, [], [helper.make_tensor_value_info(made, INT, None)]
    )


def _model(tail: list[onnx.NodeProto], outputs: list[Any]) -> onnx.ModelProto:
    """Eight channels behind a Relu, of which nothing but the number matters."""
    weights: dict[str, Array] = {
        "w": RNG.standard_normal((8, 3, 1, 1)).astype(np.float32),
        "u": RNG.standard_normal((2, 8, 1, 1)).astype(np.float32),
        "one": np.array(1, np.int64),
        "zero": np.array(0, np.float32),
    }
    head = [node("Conv", ["x", "w"], ["a"]), node("Relu", ["a"], ["b"])]
    return model([*head, *tail], weights, inputs=[value("x", shape=("N", 3, 4, 4))], outputs=outputs)


FLAG = [node("ReduceMean", ["x"], ["mean"], keepdims=0), node("Greater", ["mean", "zero"], ["flag"])]
TAILS: dict[str, tuple[list[onnx.NodeProto], int]] = {
    "a shape with a dynamic entry": ([node("Shape", ["b"], ["y"])], INT),
    "one size": ([node("Shape", ["b"], ["y"], start=1, end=2)], INT),
    "a product with a dynamic size": ([node("Size", ["b"], ["y"])], INT),
    "floats": ([node("Shape", ["b"], ["s"]), node("Cast", ["s"], ["y"], to=1)], TensorProto.FLOAT),
    "a root": (
        [
            node("Shape", ["b"], ["s"], start=1, end=2),
            node("Cast", ["s"], ["float"], to=1),
            node("Sqrt", ["float"], ["y"]),
        ],
        TensorProto.FLOAT,
    ),
    "in branches": (
        [
            *FLAG,
            node("Shape", ["b"], ["s"]),
            node("If", ["flag"], ["y"], then_branch=_branch("Add"), else_branch=_branch("Mul")),
        ],
        INT,
    ),
    "times an input": (
        [node("Shape", ["b"], ["s"]), node("Cast", ["s"], ["float"], to=1), node("Mul", ["float", "mean"], ["y"])],
        TensorProto.FLOAT,
    ),
}
TAILS["times an input"][0].insert(0, FLAG[0])


@pytest.mark.parametrize("tail", TAILS)
def test_a_size_that_leaves_the_graph_stays_what_it_was(tail: str) -> None:
    nodes, kind = TAILS[tail]
    proto = _model(nodes, [value("y", kind, shape=None)])
    result = cipm_ir.optimize(proto, ["remove-dead"], verify=False)
    assert "7 dead" in result.report.steps[0].summary
    for sign in (1, -1):
        assert same_bits(run(proto, {"x": sign * X}), run(result.model, {"x": sign * X}))


def test_a_size_may_be_an_output_and_a_literal() -> None:
    tail = [node("Shape", ["b"], ["y"]), node("Reshape", ["b", "y"], ["c"]), node("Conv", ["c", "u"], ["z"])]
    proto = _model(tail, [value("y", INT, shape=None), value("z", shape=None)])
    result = cipm_ir.optimize(proto, ["prune{ratio=0.5}"], verify=False)
    (before, wide), (after, narrow) = run(proto, {"x": X}), run(result.model, {"x": X})
    assert before.tolist() == after.tolist() == [2, 8, 4, 4]
    assert wide.shape == narrow.shape and not np.array_equal(wide, narrow)
    assert cipm_ir.load(result.model).spaces[0].size == 4
