"""Clean-up of single Splits, Pads that several Convs share, scattered constants and sizes behind unknown ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from tests.models.cleaning import AWKWARD, cleaned, model, node, operators, run, same_bits, stays, value

I64 = TensorProto.INT64
X = {"x": AWKWARD.reshape(3, 4)}
IMAGE = {"x": np.random.default_rng(0).standard_normal((2, 3, 5, 5)).astype(np.float32)}


def same(proto: onnx.ModelProto, feeds: Any, expected: list[str], **options: Any) -> None:
    after = cleaned(proto, **options)
    assert operators(after) == expected
    assert same_bits(run(proto, feeds), run(after, feeds))


# ------------------------------------------------------------ Split
@pytest.mark.parametrize(
    ("opset", "given", "attributes"),
    [(11, False, {}), (11, False, {"split": [4]}), (13, False, {}), (13, True, {}), (18, False, {"num_outputs": 1})],
)
def test_a_split_into_one_part_goes(opset: int, given: bool, attributes: dict[str, Any]) -> None:
    inputs = ["x", "sizes"] if given else ["x"]
    nodes = [node("Split", inputs, ["a"], axis=1, **attributes), node("Abs", ["a"], ["y"])]
    same(model(nodes, {"sizes": np.array([4])} if given else {}, opset=opset), X, ["Abs"])


def test_splits_that_stay() -> None:
    """Into two parts; with a size that is not proven, or computed: another size is an error, which stays one."""
    two = [node("Split", ["x"], ["a", "b"], axis=1), node("Add", ["a", "b"], ["y"])]
    assert stays(model(two, opset=13))
    one = [node("Split", ["x", "sizes"], ["a"], axis=0), node("Abs", ["a"], ["y"])]
    assert stays(model(one, {"sizes": np.array([3])}, opset=13))
    assert stays(model(one, inputs=[value("x"), value("sizes", I64, (1,))], opset=13))
    old = [node("Split", ["x"], ["a"], axis=0, split=[3]), node("Abs", ["a"], ["y"])]
    assert stays(model(old, opset=11))


# ------------------------------------------------------------ Pad
PADS = np.array([0, 0, 1, 0, 0, 0, 1, 2])
KERNELS = {name: np.random.default_rng(k).standard_normal((4, 3, 2, 2)).astype("f4") for k, name in enumerate("vw")}


def padded(*last: onnx.NodeProto, pads: Any = PADS, value: float = 0.0, **given: Any) -> onnx.ModelProto:
    constants = {**KERNELS, "p": np.asarray(pads), "zero": np.array(value, np.float32)}
    nodes = [node("Pad", ["x", "p", "zero"], ["a"]), *last]
    return model(nodes, constants, inputs=[_image()], **given)


def _image() -> onnx.ValueInfoProto:
    return value("x", shape=("N", 3, 5, 5))


def conv(weight: str, out: str, **attributes: Any) -> onnx.NodeProto:
    return node("Conv", ["a", weight], [out], **attributes)


def test_convs_that_share_a_pad_pad_themselves() -> None:
    pair = [conv("v", "b", pads=[1, 0, 0, 1]), conv("w", "c", pads=[1, 0, 0, 1]), node("Add", ["b", "c"], ["y"])]
    after = cleaned(padded(*pair))
    assert operators(after) == ["Conv", "Conv", "Add"]
    assert all(list(n.attribute[0].ints) == [2, 0, 1, 3] for n in after.graph.node[:2])
    assert np.allclose(run(padded(*pair), IMAGE)[0], run(after, IMAGE)[0], atol=1e-5)


@pytest.mark.parametrize("other", ["Relu", "auto_pad", "output", "weight", "MaxPool"])
def test_shared_pads_that_stay(other: str) -> None:
    """Where one consumer cannot pad, the Pad stays, and then no Conv changes."""
    outputs = [value("y", shape=None)]
    if other == "Relu":
        last = [conv("w", "y"), node("Relu", ["a"], ["z"])]
        outputs.append(value("z", shape=None))
    elif other == "auto_pad":
        last = [conv("w", "y"), conv("v", "z", auto_pad="SAME_UPPER")]
        outputs.append(value("z", shape=None))
    elif other == "output":
        last = [conv("w", "y")]
        outputs.append(value("a", shape=None))
    elif other == "weight":
        last = [conv("w", "y"), node("Conv", ["x", "a"], ["z"], pads=[9, 9, 9, 9])]
        outputs.append(value("z", shape=None))
    else:
        last = [conv("w", "y"), node("MaxPool", ["a"], ["z"], kernel_shape=[2, 2])]
        outputs.append(value("z", shape=None))
    assert stays(padded(*last, outputs=outputs))


def test_pads_with_other_numbers_stay() -> None:
    pair = [conv("v", "b"), conv("w", "c"), node("Add", ["b", "c"], ["y"])]
    assert stays(padded(*pair, value=1.0))
    assert stays(padded(*pair, pads=[0, 0, -1, 0, 0, 0, 0, 0]))
    assert stays(padded(*pair, pads=[0, 1, 0, 0, 0, -1, 0, 0]))


# ------------------------------------------------------------ Scatter
def scattered(op: str = "ScatterElements", sizes: Any = (20000,), *, shape: Any = (5000, 4), **given: Any) -> Any:
    place = np.arange(0, 60, 3)
    constants = {
        "sizes": np.array(sizes),
        "at": place if op == "ScatterElements" else place[:, None],
        "numbers": np.arange(20, dtype=np.float32) + 1,
        "target": np.array(shape),
    }
    nodes = [
        node("ConstantOfShape", ["sizes"], ["fill"]),
        node(op, ["fill", "at", "numbers"], ["sparse"]),
        node("Reshape", ["sparse", "target"], ["w"]),
        node("MatMul", ["x", "w"], ["y"]),
    ]
    return model(nodes, constants, inputs=[value("x", shape=("N", shape[0]))], **given)


@pytest.mark.parametrize("op", ["ScatterElements", "ScatterND"])
def test_a_sparse_weight_becomes_dense(op: str) -> None:
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 5000)).astype(np.float32)}
    same(scattered(op), feeds, ["MatMul"])


def test_sparse_weights_that_stay() -> None:
    """Larger than what may be stored; scattered over by an input; on sizes that are not known."""
    assert "ScatterElements" in operators(cleaned(scattered(sizes=(400000,), shape=(100000, 4))))
    proto = scattered()
    proto.graph.initializer.remove(next(i for i in proto.graph.initializer if i.name == "numbers"))
    proto.graph.input.append(value("numbers", shape=(20,)))
    assert "ScatterElements" in operators(cleaned(proto))
    proto = scattered()
    proto.graph.initializer.remove(next(i for i in proto.graph.initializer if i.name == "sizes"))
    proto.graph.input.append(value("sizes", I64, (1,)))
    assert "ConstantOfShape" in operators(cleaned(proto))


def test_a_fill_alone_is_not_stored() -> None:
    nodes = [node("ConstantOfShape", ["sizes"], ["fill"]), node("Add", ["x", "fill"], ["y"])]
    assert stays(model(nodes, {"sizes": np.array([4])}))


@pytest.mark.parametrize("uses", [1, 2])
def test_a_large_weight_is_reshaped_once_where_nothing_else_needs_it(uses: int) -> None:
    weight = np.random.default_rng(0).standard_normal((4, 10000)).astype(np.float32)
    nodes = [node("Reshape", ["w", "target"], ["r"]), node("MatMul", ["x", "r"], ["y"])]
    outputs = [value("y", shape=None)]
    if uses == 2:
        nodes.append(node("MatMul", ["x", "w"], ["z"]))
        outputs.append(value("z", shape=None))
    proto = model(nodes, {"w": weight, "target": np.array([2, 4, 5000])}, outputs=outputs)
    same(proto, X, ["MatMul"] if uses == 1 else ["Reshape", "MatMul", "MatMul"])


# ------------------------------------------------------------ sizes
def expanded(first: int, second: int) -> onnx.ModelProto:
    """How torch writes ``x[:, None].expand(-1, n, -1)``: a size of -1 becomes 1 by Equal and Where."""
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"]),
        node("Concat", ["a", "n", "b"], ["sizes"], axis=0),
        node("Equal", ["sizes", "open"], ["is_open"]),
        node("Where", ["is_open", "ones", "sizes"], ["target"]),
        node("Expand", ["row", "target"], ["y"]),
    ]
    constants = {
        "zero": np.array([0]),
        "a": np.array([first]),
        "b": np.array([second]),
        "open": np.array([-1, -1, -1]),
        "ones": np.array([1, 1, 1]),
        "row": np.arange(4, dtype=np.float32).reshape(1, 1, 4),
    }
    return model(nodes, constants)


@pytest.mark.parametrize(("first", "second"), [(-1, -1), (2, -1), (-1, 4)])
def test_no_size_is_negative(first: int, second: int) -> None:
    proto = expanded(first, second)
    after = cleaned(proto)
    assert "Equal" not in operators(after)
    for n in (1, 3):
        feeds = {"x": np.ones((n, 4), np.float32)}
        assert same_bits(run(proto, feeds), run(after, feeds))


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_size_may_be_any_other_number(number: int) -> None:
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"]),
        node("Equal", ["n", "number"], ["same"]),
        node("Where", ["same", "big", "n"], ["t"]),
        node("Expand", ["one", "t"], ["y"]),
    ]
    constants = {
        "zero": np.array([0]),
        "number": np.array([number]),
        "big": np.array([7]),
        "one": np.ones(1, np.float32),
    }
    proto = model(nodes, constants)
    after = cleaned(proto)
    assert "Equal" in operators(after)
    for n in (1, 3):
        feeds = {"x": np.ones((n, 4), np.float32)}
        assert same_bits(run(proto, feeds), run(after, feeds))


@pytest.mark.parametrize("last", [-1, 0, 1])
def test_sizes_behind_an_unknown_rank(last: int) -> None:
    """Of what a Reshape by computed sizes makes, the entries that are numbers are known, the others are not."""
    nodes = [
        node("Reshape", ["x", "hidden"], ["u"]),
        node("Shape", ["u"], ["s"]),
        node("Gather", ["s", "first"], ["n"]),
        node("Concat", ["n", "rest"], ["target"], axis=0),
        node("Reshape", ["u", "target"], ["r"]),
        node("Shape", ["r"], ["t"]),
        node("Gather", ["t", "last"], ["size"]),
        node("Cast", ["size"], ["f"], to=TensorProto.FLOAT),
        node("Sqrt", ["f"], ["root"]),
        node("Div", ["r", "root"], ["y"]),
    ]
    constants = {"first": np.array([0]), "rest": np.array([2, 2]), "last": np.array([last])}
    inputs = [value("x"), value("hidden", I64, None)]
    proto = model(nodes, constants, inputs=inputs)
    after = cleaned(proto)
    assert ("Sqrt" not in operators(after)) == (last != 0)
    for n, hidden in ((3, [3, 4]), (5, [5, 2, 2])):
        feeds = {"x": np.ones((n, 4), np.float32), "hidden": np.array(hidden)}
        assert same_bits(run(proto, feeds), run(after, feeds))
