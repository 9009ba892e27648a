"""Clean-up of shape changes, Dropout and sequences: models inside the condition of each rule, and just outside."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from tests.models.cleaning import AWKWARD, Array, cleaned, model, node, operators, run, same_bits, scalar, stays, value

I64, BOOL = TensorProto.INT64, TensorProto.BOOL
X = {"x": AWKWARD.reshape(3, 4)}


def reshaped(target: list[int], shape: tuple[Any, ...], **attributes: Any) -> onnx.ModelProto:
    nodes = [node("Reshape", ["x", "t"], ["a"], **attributes), node("Relu", ["a"], ["y"])]
    return model(nodes, {"t": np.array(target)}, inputs=[value("x", shape=shape)])


@pytest.mark.parametrize(
    ("target", "shape", "attributes"),
    [
        ([3, 4], (3, 4), {}),
        ([0, 4], ("N", 4), {}),
        ([0, 0], ("N", "M"), {}),
        ([-1, 4], ("N", 4), {}),
        ([0, -1], ("N", "M"), {}),
        ([0, 4, -1], ("N", 4, "M"), {}),
        ([3, 4], (3, 4), {"allowzero": 1}),
    ],
)
def test_a_reshape_to_the_same_shape_goes(target: list[int], shape: tuple[Any, ...], attributes: Any) -> None:
    assert operators(cleaned(reshaped(target, shape, **attributes))) == ["Relu"]


@pytest.mark.parametrize(
    ("target", "shape", "attributes"),
    [
        ([3, 4], ("N", 4), {}),
        ([4, 3], (3, 4), {}),
        ([-1, 4], ("N", "M"), {}),
        ([1, 3, 4], (3, 4), {}),
        ([-1], (3, 4), {}),
        ([0, 4], ("N", 4), {"allowzero": 1}),
        ([-1, 0], ("N", 4, 1), {}),
    ],
)
def test_other_reshapes_stay(target: list[int], shape: tuple[Any, ...], attributes: Any) -> None:
    assert stays(reshaped(target, shape, **attributes))


def test_a_reshape_to_its_own_computed_shape_goes() -> None:
    """Sizes are followed as symbols; two inputs that use one symbol are not taken for equal."""
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"]),
        node("Concat", ["n", "four"], ["t"], axis=0),
        node("Reshape", ["x", "t"], ["a"]),
        node("Relu", ["a"], ["y"]),
    ]
    constants = {"zero": np.array([0]), "four": np.array([4])}
    assert operators(cleaned(model(nodes, constants))) == ["Relu"]
    other = [node("Shape", ["z"], ["s"]), *nodes[1:]]
    assert "Reshape" in operators(cleaned(model(other, constants, inputs=[value("x"), value("z")])))
    wrong = [nodes[0], nodes[1], node("Concat", ["four", "n"], ["t"], axis=0), *nodes[3:]]
    assert "Reshape" in operators(cleaned(model(wrong, constants)))


def test_recorded_shapes_of_inner_values_are_not_believed() -> None:
    """A file made for batch 1 whose input was made dynamic: what it records inside is old."""
    nodes = [node("Relu", ["x"], ["a"]), node("Shape", ["a"], ["s"]), node("Reshape", ["a", "t"], ["y"])]
    nodes.append(node("Add", ["s", "s"], ["z"]))
    outputs = [value("y", shape=None), value("z", I64, None)]
    proto = model(nodes, {"t": np.array([1, 4])}, outputs=outputs, inner=[value("a", shape=(1, 4))])
    after = cleaned(proto)
    assert operators(after) == ["Relu", "Shape", "Reshape", "Add"]
    feeds = {"x": np.ones((1, 4), "float32")}
    assert same_bits(run(proto, feeds), run(after, feeds))


@pytest.mark.parametrize(
    ("target", "shape", "goes"),
    [
        ([3, 4], (3, 4), True),
        ([1, 4], ("N", 4), True),
        ([1], ("N", 4), True),
        ([4], ("N", 4), True),
        ([1, 1], ("N", "M"), True),
        ([3, 4], ("N", 4), False),
        ([2, 4], (1, 4), False),
        ([1, 1, 4], ("N", 4), False),
        ([4], ("N", "M"), False),
    ],
)
def test_expand(target: list[int], shape: tuple[Any, ...], goes: bool) -> None:
    nodes = [node("Expand", ["x", "t"], ["a"]), node("Relu", ["a"], ["y"])]
    proto = model(nodes, {"t": np.array(target)}, inputs=[value("x", shape=shape)])
    assert (operators(cleaned(proto)) == ["Relu"]) == goes


def test_transposes() -> None:
    def chain(*perms: list[int] | None, shape: tuple[Any, ...] | None = ("A", "B", "C")) -> onnx.ModelProto:
        names = ["x", *(f"v{k}" for k in range(len(perms)))]
        nodes = [
            node("Transpose", [a], [b], **({} if p is None else {"perm": p}))
            for a, b, p in zip(names, names[1:], perms, strict=False)
        ]
        return model([*nodes, node("Relu", [names[-1]], ["y"])], inputs=[value("x", shape=shape)])

    assert operators(cleaned(chain([0, 1, 2]))) == ["Relu"]
    assert operators(cleaned(chain([0, 2, 1]))) == ["Transpose", "Relu"]
    assert operators(cleaned(chain([1, 2, 0], [2, 0, 1]))) == ["Relu"]
    assert operators(cleaned(chain(None, None))) == ["Relu"]
    assert operators(cleaned(chain(None, None, shape=None))) == ["Transpose", "Transpose", "Relu"]
    three = chain([1, 2, 0], [0, 2, 1], [0, 2, 1], [0, 2, 1])
    after = cleaned(three)
    assert operators(after) == ["Transpose", "Relu"]
    feeds = {"x": np.arange(24, dtype="float32").reshape(2, 3, 4)}
    assert same_bits(run(three, feeds), run(after, feeds))


def test_the_value_between_two_nodes_is_kept_for_others() -> None:
    nodes = [
        node("Transpose", ["x"], ["a"], perm=[0, 2, 1]),
        node("Transpose", ["a"], ["b"], perm=[1, 0, 2]),
        node("Relu", ["b"], ["y"]),
        node("Abs", ["a"], ["z"]),
    ]
    outputs = [value("y", shape=None), value("z", shape=None)]
    assert stays(model(nodes, inputs=[value("x", shape=("A", "B", "C"))], outputs=outputs))


@pytest.mark.parametrize(
    ("first", "second", "count"),
    [
        ([12], [3, 4], 1),
        ([12], [-1, 2], 1),
        ([2, 6], [0, 6], 0),  # the same as the first, which is then the input's shape
        ([12, 1], [0, 1], 1),
        ([6, 2], [0, -1], 2),  # what is copied cannot be computed
        ([6, 2], [0, 0], 2),
    ],
)
def test_two_reshapes(first: list[int], second: list[int], count: int) -> None:
    nodes = [node("Reshape", ["x", "s"], ["a"]), node("Reshape", ["a", "t"], ["b"]), node("Relu", ["b"], ["y"])]
    proto = model(nodes, {"s": np.array(first), "t": np.array(second)}, inputs=[value("x", shape=(2, 6))])
    after = cleaned(proto)
    assert operators(after).count("Reshape") <= count and operators(after)[-1] == "Relu"
    feeds = {"x": np.arange(12, dtype="float32").reshape(2, 6)}
    assert same_bits(run(proto, feeds), run(after, feeds))


def test_a_zero_that_is_a_size_is_not_a_copy() -> None:
    nodes = [
        node("Reshape", ["x", "s"], ["a"]),
        node("Reshape", ["a", "t"], ["b"], allowzero=1),
        node("Relu", ["b"], ["y"]),
    ]
    proto = model(nodes, {"s": np.array([0, 6]), "t": np.array([3, 0])}, inputs=[value("x", shape=(0, 6))])
    after = cleaned(proto)
    assert operators(after) == ["Reshape", "Relu"]
    feeds = {"x": np.zeros((0, 6), "float32")}
    assert same_bits(run(proto, feeds), run(after, feeds))


@pytest.mark.parametrize(
    ("first", "second", "ranked", "count"),
    [
        ([1], [0], False, 1),
        ([0], [1], False, 1),
        ([0, 2], [1, 3], False, 1),
        ([-1], [0], True, 1),
        ([0], [-2], True, 1),
        ([-1], [0], False, 2),
        ([0], [-1], False, 2),
    ],
)
def test_two_unsqueezes(first: list[int], second: list[int], ranked: bool, count: int) -> None:
    nodes = [node("Unsqueeze", ["x", "s"], ["a"]), node("Unsqueeze", ["a", "t"], ["b"]), node("Relu", ["b"], ["y"])]
    given = [value("x", shape=("A", "B") if ranked else None)]
    proto = model(nodes, {"s": np.array(first), "t": np.array(second)}, inputs=given)
    after = cleaned(proto)
    assert operators(after).count("Unsqueeze") == count
    feeds = {"x": np.arange(6, dtype="float32").reshape(2, 3)}
    assert same_bits(run(proto, feeds), run(after, feeds))


# --- dropout, sequences, concatenation -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("opset", "ratio", "training", "attributes", "goes"),
    [
        (20, 0.5, None, {}, True),
        (20, 0.5, False, {}, True),
        (20, 0.0, True, {}, True),
        (20, 0.5, True, {}, False),
        (20, 1e-9, True, {}, False),
        (11, None, None, {"ratio": 0.5}, True),
        (6, None, None, {"ratio": 0.5, "is_test": 1}, True),
        (6, None, None, {"ratio": 0.5}, False),
    ],
)
def test_dropout(opset: int, ratio: float | None, training: bool | None, attributes: Any, goes: bool) -> None:
    constants: dict[str, Array] = {}
    inputs = ["x"]
    if ratio is not None:
        constants["r"], inputs = scalar(ratio), [*inputs, "r"]
    if training is not None:
        constants["m"], inputs = np.array(training), [*inputs, "m"]
    proto = model([node("Dropout", inputs, ["a"], **attributes), node("Relu", ["a"], ["y"])], constants, opset=opset)
    assert (operators(cleaned(proto)) == ["Relu"]) == goes


def test_dropout_whose_mask_is_used_stays() -> None:
    nodes = [node("Dropout", ["x"], ["a", "mask"]), node("Relu", ["a"], ["y"])]
    outputs = [value("y", shape=None), value("mask", BOOL, None)]
    proto = model(nodes, outputs=outputs)
    after = cleaned(proto)
    assert operators(after) == ["Dropout", "Relu"]
    assert same_bits(run(proto, X), run(after, X))
    asked = model(
        [node("Dropout", ["x", "", "t"], ["a"]), node("Relu", ["a"], ["y"])], inputs=[value("x"), value("t", 9, [])]
    )
    assert stays(asked)  # whether it trains is an input


def test_concat_and_sequences() -> None:
    assert operators(cleaned(model([node("Concat", ["x"], ["a"], axis=0), node("Relu", ["a"], ["y"])]))) == ["Relu"]
    assert stays(model([node("Concat", ["x", "x"], ["a"], axis=0), node("Relu", ["a"], ["y"])]))
    built = [node("Relu", ["x"], ["a"]), node("SequenceConstruct", ["x", "a"], ["s"])]
    taken = model([*built, node("SequenceAt", ["s", "k"], ["y"])], {"k": np.array(-1)})
    assert operators(cleaned(taken)) == ["Relu"]
    assert same_bits(run(taken, X), run(cleaned(taken), X))
    outside = model([*built, node("SequenceAt", ["s", "k"], ["y"])], inputs=[value("x"), value("k", I64, [])])
    assert stays(outside)
    joined = model([*built, node("ConcatFromSequence", ["s"], ["y"], axis=-1)])
    assert operators(cleaned(joined)) == ["Relu", "Concat"]
    assert same_bits(run(joined, X), run(cleaned(joined), X))
    assert stays(model([*built, node("ConcatFromSequence", ["s"], ["y"], axis=0, new_axis=1)]))
