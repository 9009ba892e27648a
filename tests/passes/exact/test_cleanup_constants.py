"""What clean-up folds and merges, and what comes close to it and stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.models.cleaning import AWKWARD, Array, cleaned, model, node, operators, run, same_bits, scalar, stays, value

F, I64, I32, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL
X = {"x": AWKWARD.reshape(3, 4)}


def test_constants_are_the_numbers_that_the_runtime_computes() -> None:
    rng = np.random.default_rng(0)
    weights = {"a": rng.standard_normal((33, 4)).astype("float32"), "b": rng.standard_normal((4, 4)).astype("float32")}
    nodes = [
        node("MatMul", ["a", "b"], ["c"]),
        node("Softmax", ["c"], ["d"], axis=0),
        node("ReduceSum", ["d", "axes"], ["e"], keepdims=0),
        node("Mul", ["x", "e"], ["y"]),
    ]
    proto = model(nodes, {**weights, "axes": np.array([0])})
    after = cleaned(proto)
    assert operators(after) == ["Mul"]
    feeds = {"x": rng.standard_normal((5, 4)).astype("float32")}
    assert same_bits(run(proto, feeds), run(after, feeds))


def test_integer_division_of_constants() -> None:
    nodes = [node("Div", ["a", "b"], ["c"]), node("Mod", ["a", "b"], ["d"]), node("Add", ["c", "d"], ["e"])]
    nodes += [node("Cast", ["e"], ["f"], to=F), node("Mul", ["x", "f"], ["y"])]
    proto = model(nodes, {"a": np.array([-7, 7, -8, 5]), "b": np.array([2, -2, 3, 3])})
    after = cleaned(proto)
    assert operators(after) == ["Mul"]
    assert same_bits(run(proto, X), run(after, X))


def test_several_outputs_and_left_out_inputs() -> None:
    nodes = [
        node("Split", ["a"], ["p", "q"], axis=0, num_outputs=2),
        node("Slice", ["p", "starts", "ends", "", "steps"], ["r"]),
        node("Mul", ["x", "r"], ["s"]),
        node("Mul", ["s", "q"], ["y"]),
    ]
    ends = {"starts": np.array([3]), "ends": np.array([-9]), "steps": np.array([-1])}
    proto = model(nodes, {"a": np.arange(8, dtype="float32"), **ends})
    after = cleaned(proto)
    assert operators(after) == ["Mul", "Mul"]
    feeds = {"x": np.ones((2, 4), "float32")}
    assert same_bits(run(proto, feeds), run(after, feeds))


@pytest.mark.parametrize("op", ["RandomNormalLike", "RandomUniformLike", "Bernoulli"])
def test_random_operators_are_neither_folded_nor_merged(op: str) -> None:
    nodes = [
        node(op, ["c"], ["a"]),
        node(op, ["c"], ["b"]),
        node("Sub", ["a", "b"], ["d"]),
        node("Mul", ["x", "d"], ["y"]),
    ]
    assert stays(model(nodes, {"c": np.full(4, 0.5, "float32")}))


def test_what_is_never_folded() -> None:
    filled = [node("ConstantOfShape", ["s"], ["c"]), node("Add", ["x", "c"], ["y"])]
    assert stays(model(filled, {"s": np.array([4])}))
    quantized = [node("QuantizeLinear", ["w", "k"], ["q"]), node("DequantizeLinear", ["q", "k"], ["r"])]
    assert stays(model([*quantized, node("Mul", ["x", "r"], ["y"])], {"w": np.ones(4, "float32"), "k": scalar(0.5)}))
    # What fails in the model still fails there, and not in the pass.
    fails = [node("Gather", ["w", "k"], ["a"]), node("Mul", ["x", "a"], ["y"])]
    assert stays(model(fails, {"w": np.ones(4, "float32"), "k": np.array(9)}))


def test_sizes_fold_only_where_they_are_declared() -> None:
    nodes = [node("Shape", ["x"], ["s"]), node("Gather", ["s", "k"], ["d"]), node("Cast", ["d"], ["f"], to=F)]
    nodes.append(node("Mul", ["x", "f"], ["y"]))
    known = cleaned(model(nodes, {"k": np.array(1)}))
    assert operators(known) == ["Mul"]
    assert same_bits(run(model(nodes, {"k": np.array(1)}), X), run(known, X))
    assert operators(cleaned(model(nodes, {"k": np.array(0)}))) == ["Shape", "Gather", "Cast", "Mul"]
    assert operators(cleaned(model(nodes, {"k": np.array(-1)}, inputs=[value("x", shape=None)])))[0] == "Shape"


def test_sizes_of_subgraph_inputs_do_not_fold() -> None:
    """The body of a Loop sees its carried value at every size that it takes."""
    body = helper.make_graph(
        [
            node("Identity", ["go"], ["go_on"]),
            node("Concat", ["v", "v"], ["w"], axis=0),
            node("Shape", ["v"], ["s"]),
        ],
        "body",
        [value("i", I64, []), value("go", BOOL, []), value("v", shape=None)],
        [value("go_on", BOOL, []), value("w", shape=None), value("s", I64, None)],
    )
    nodes = [node("Loop", ["n", "", "x"], ["y", "sizes"], body=body)]
    outputs = [value("y", shape=None), value("sizes", I64, None)]
    proto = model(nodes, {"n": np.array(3)}, outputs=outputs)
    after = cleaned(proto)
    assert [n.op_type for n in after.graph.node[0].attribute[0].g.node].count("Shape") == 1
    assert same_bits(run(proto, X), run(after, X))


# --- equal nodes ---------------------------------------------------------------------------------------------


def twins(first: onnx.NodeProto, second: onnx.NodeProto, *constants: onnx.NodeProto, **given: Any) -> onnx.ModelProto:
    return model([*constants, first, second, node("Sub", ["a", "b"], ["y"])], **given)


def test_equal_nodes_are_merged() -> None:
    proto = twins(node("LeakyRelu", ["x"], ["a"], alpha=0.1), node("LeakyRelu", ["x"], ["b"], alpha=0.1))
    assert operators(cleaned(proto)) == ["LeakyRelu", "Sub"]


@pytest.mark.parametrize(
    "pair",
    [
        (node("LeakyRelu", ["x"], ["a"], alpha=0.1), node("LeakyRelu", ["x"], ["b"], alpha=0.2)),
        (node("LeakyRelu", ["x"], ["a"], alpha=0.0), node("LeakyRelu", ["x"], ["b"], alpha=-0.0)),
        (node("Relu", ["x"], ["a"]), node("Relu", ["z"], ["b"])),
        (node("Selu", ["x"], ["a"]), node("Selu", ["x"], ["b"], alpha=1.0)),
        (node("Dropout", ["x", "r", "t"], ["a"]), node("Dropout", ["x", "r", "t"], ["b"])),
        (node("LayerNormalization", ["x", "g"], ["a"]), node("LayerNormalization", ["x", "g"], ["b", "mean"])),
    ],
)
def test_nearly_equal_nodes_are_not(pair: tuple[onnx.NodeProto, onnx.NodeProto]) -> None:
    constants = {"r": scalar(0.5), "t": np.array(True), "g": np.ones(4, "float32")}
    last = node("Sum", [name for n in pair for name in n.output if name in "ab"], ["y"])
    proto = model([*pair, last], constants, inputs=[value("x"), value("z")])
    assert operators(cleaned(proto))[:2] == [n.op_type for n in pair]


@pytest.mark.parametrize(
    ("one", "other", "merged"),
    [
        (scalar(2.0), scalar(2.0), True),
        (scalar(0.0), scalar(-0.0), False),
        (scalar(2.0), np.full(1, 2.0, "float32"), False),
        (np.array([np.nan], "float32"), np.array([0x7FC00001], "uint32").view("float32"), False),
        (np.arange(11, dtype="float32"), np.arange(11, dtype="float32"), False),
    ],
)
def test_constants_are_compared_by_their_bits(one: Array, other: Array, merged: bool) -> None:
    made = [node("Constant", [], [k], value=numpy_helper.from_array(v)) for k, v in (("p", one), ("q", other))]
    nodes = [*made, node("Gather", ["x", "i"], ["a"]), node("Mul", ["p", "a"], ["b"]), node("Div", ["b", "q"], ["y"])]
    proto = model(nodes, {"i": np.array([0])}, inputs=[value("x", shape=("N", 1))])
    assert operators(cleaned(proto)).count("Constant") == (1 if merged else 2)


def test_equal_numbers_of_other_types_are_not_merged() -> None:
    made = [
        node("Constant", [], ["p"], value=numpy_helper.from_array(np.array(1, "int32"))),
        node("Constant", [], ["q"], value=numpy_helper.from_array(np.array(1, "float32"))),
    ]
    nodes = [
        *made,
        node("Cast", ["x"], ["a"], to=I32),
        node("Sub", ["a", "p"], ["b"]),
        node("Cast", ["b"], ["c"], to=F),
    ]
    proto = model([*nodes, node("Sub", ["c", "q"], ["y"])])
    assert operators(cleaned(proto)).count("Constant") == 2


def test_functions_are_merged_where_they_draw_nothing() -> None:
    def calls(body: list[onnx.NodeProto]) -> onnx.ModelProto:
        opsets = [helper.make_opsetid("", 20)]
        function = helper.make_function("own", "F", ["u"], ["v"], body, opsets)
        return twins(node("F", ["x"], ["a"], domain="own"), node("F", ["x"], ["b"], domain="own"), functions=[function])

    assert operators(cleaned(calls([node("Relu", ["u"], ["v"])]))) == ["F", "Sub"]
    assert operators(cleaned(calls([node("Bernoulli", ["u"], ["v"])]))) == ["F", "F", "Sub"]


def test_graphs_of_different_branches_are_not_merged() -> None:
    branch = {
        name: helper.make_graph(
            [node("Exp", ["x"], [name]), node("Neg", [name], [f"{name}2"])], name, [], [value(f"{name}2")]
        )
        for name in ("then", "else")
    }
    nodes = [node("If", ["c"], ["y"], then_branch=branch["then"], else_branch=branch["else"])]
    proto = model(nodes, inputs=[value("x"), value("c", BOOL, [])])
    assert stays(proto)
    feeds = {**X, "c": np.array(True)}
    assert same_bits(run(proto, feeds), run(cleaned(proto), feeds))


def test_bounds_of_a_range_become_scalars() -> None:
    """onnxruntime takes a vector of one entry for a bound where it cannot tell, and refuses a constant one."""
    nodes = [
        node("Shape", ["x"], ["s"], start=1),
        node("Range", ["zero", "s", "one"], ["r"]),
        node("Cast", ["r"], ["f"], to=F),
    ]
    proto = model([*nodes, node("Mul", ["x", "f"], ["y"])], {"zero": np.array(0), "one": np.array(1)})
    after = cleaned(proto)
    assert operators(after) == ["Mul"]
    with np.errstate(invalid="ignore"):
        expected = AWKWARD.reshape(3, 4) * np.arange(4, dtype=np.float32)
    assert np.array_equal(run(after, X)[0], expected, equal_nan=True)
