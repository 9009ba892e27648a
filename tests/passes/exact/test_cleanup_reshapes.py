"""Clean-up of what keeps the order of entries: rows of it, computed targets, and what must stay as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from tests.models.cleaning import Array, cleaned, model, node, operators, run, same_bits, stays, value

RNG = np.random.default_rng(0)


def built(
    nodes: list[onnx.NodeProto], constants: dict[str, Any], shape: tuple[Any, ...], **more: Any
) -> onnx.ModelProto:
    lists = {name: np.asarray(array) for name, array in constants.items()}
    return model([*nodes, node("Relu", ["z"], ["y"])], lists, inputs=[value("x", shape=shape)], **more)


def left(proto: onnx.ModelProto, *sizes: tuple[int, ...]) -> list[str]:
    """The operators after clean-up, without Constants; equal bit for bit at these sizes."""
    made = cleaned(proto)
    for size in sizes:
        feeds = {"x": RNG.standard_normal(size).astype("float32")}
        assert same_bits(run(proto, feeds), run(made, feeds))
    return [op for op in operators(made) if op != "Constant"]


def target(proto: onnx.ModelProto) -> list[int]:
    """The constant target of the only Reshape after clean-up."""
    made = cleaned(proto)
    (reshape,) = [n for n in made.graph.node if n.op_type == "Reshape"]
    held = {n.output[0]: n.attribute[0].t for n in made.graph.node if n.op_type == "Constant"}
    held |= {tensor.name: tensor for tensor in made.graph.initializer}
    found: list[int] = numpy_helper.to_array(held[reshape.input[1]]).tolist()
    return found


RESHAPE, FLATTEN = node("Reshape", ["x", "t"], ["a"]), node("Flatten", ["x"], ["a"], axis=2)
TURN = node("Transpose", ["x"], ["a"], perm=[0, 2, 1])
UNSQUEEZE, SQUEEZE = node("Unsqueeze", ["x", "one"], ["a"]), node("Squeeze", ["x", "one"], ["a"])


@pytest.mark.parametrize(
    ("nodes", "constants", "shape", "made"),
    [
        ([UNSQUEEZE, node("Reshape", ["a", "t"], ["z"])], {"one": [1], "t": [-1, 2, 2]}, ("N", 4), [-1, 2, 2]),
        ([UNSQUEEZE, node("Reshape", ["a", "t"], ["z"])], {"one": [1], "t": [0, 2, 2]}, ("N", 4), [0, 2, 2]),
        ([UNSQUEEZE, node("Reshape", ["a", "t"], ["z"])], {"one": [0], "t": [2, 0, 2]}, ("N", 4), [2, -1, 2]),
        ([RESHAPE, node("Unsqueeze", ["a", "one"], ["z"])], {"one": [3], "t": [-1, 2, 2]}, ("N", 4), [0, 2, 2, 1]),
        ([SQUEEZE, node("Flatten", ["a"], ["z"])], {"one": [1]}, ("N", 1, 2, 2), [0, 4]),
        ([FLATTEN, node("Unsqueeze", ["a", "one"], ["z"])], {"one": [0]}, (2, 2, 3, 1), [1, 4, 3]),
        ([TURN, node("Reshape", ["a", "t"], ["z"])], {"t": [0, 2, 2]}, ("N", 1, 4), [0, 2, 2]),
    ],
)  # fmt: skip
def test_a_row_becomes_one_reshape(nodes: Any, constants: Any, shape: Any, made: list[int]) -> None:
    proto = built(nodes, constants, shape)
    sizes = [tuple(n if d == "N" else d for d in shape) for n in ((2, 3) if made[0] < 1 or -1 in made else (2,))]
    if made == [2, -1, 2]:
        sizes = [(2, 4)]
    assert left(proto, *sizes) == ["Reshape", "Relu"]
    assert target(proto) == made


def test_a_row_that_ends_as_it_began_goes() -> None:
    back = [UNSQUEEZE, node("Squeeze", ["a", "one"], ["z"])]
    assert left(built(back, {"one": [1]}, ("N", 4)), (2, 4)) == ["Relu"]
    there = [node("Reshape", ["x", "t"], ["a"]), node("Reshape", ["a", "u"], ["z"])]
    assert left(built(there, {"t": [-1, 2, 2], "u": [-1, 4]}, ("N", 4)), (2, 4)) == ["Relu"]


def test_a_transpose_that_moves_entries_is_no_reshape() -> None:
    nodes = [node("Transpose", ["x"], ["a"], perm=[0, 2, 1]), node("Reshape", ["a", "t"], ["z"])]
    assert left(built(nodes, {"t": [0, 8]}, ("N", 2, 4)), (2, 2, 4)) == ["Transpose", "Reshape", "Relu"]
    # An axis of unknown size may be longer than 1.
    assert left(built(nodes, {"t": [0, -1]}, ("N", "M", 4)), (2, 3, 4)) == ["Transpose", "Reshape", "Relu"]


def test_two_sizes_that_are_not_known_stay() -> None:
    nodes = [node("Flatten", ["x"], ["a"], axis=2), node("Unsqueeze", ["a", "one"], ["z"])]
    assert left(built(nodes, {"one": [1]}, ("N", "M", 3, "L")), (2, 2, 3, 4)) == ["Flatten", "Unsqueeze", "Relu"]


def shaped(parts: list[str], constants: dict[str, Any], shape: Any, **attributes: Any) -> onnx.ModelProto:
    """x reshaped to a target that is put together from its own sizes n0, n1 and constants."""
    nodes = [node("Shape", ["x"], ["s"])]
    nodes += [node("Gather", ["s", f"i{k}"], [f"n{k}"]) for k in range(2)]
    nodes += [node("Concat", parts, ["t"], axis=0), node("Reshape", ["x", "t"], ["z"], **attributes)]
    return built(nodes, {"i0": [0], "i1": [1]} | constants, shape)


@pytest.mark.parametrize(
    ("parts", "shape", "made"),
    [
        (["n0", "k"], ("N", 3, 4), [0, 12]),
        (["n0", "minus"], ("N", 3, 4), [0, -1]),
        (["one", "n0", "k"], ("N", 3, 4), [1, -1, 12]),
        (["n0", "n1", "one", "four"], ("N", "M", 4), [0, 0, 1, 4]),
    ],
)
def test_a_computed_target_is_written_where_it_is_proven(parts: list[str], shape: Any, made: list[int]) -> None:
    constants = {"k": [12], "minus": [-1], "one": [1], "four": [4]}
    proto = shaped(parts, constants, shape)
    assert left(proto, (2, 3, 4), (5, 3, 4)) == ["Reshape", "Relu"]
    assert target(proto) == made


@pytest.mark.parametrize(
    ("parts", "shape"),
    [
        (["n1", "n0", "four"], ("N", "M", 4)),  # two sizes elsewhere
        (["n0", "k"], ("N", "M", 4)),  # 12 is right for M = 3 only, and says so when it is wrong
        (["n0", "n1", "minus"], ("N", "M", 4)),  # with an empty batch, 0 beside -1 fails
    ],
)
def test_other_computed_targets_stay(parts: list[str], shape: Any) -> None:
    constants = {"k": [12], "minus": [-1], "four": [4]}
    found = left(shaped(parts, constants, shape), (2, 3, 4))
    assert "Concat" in found or parts[-1] == "minus"


def test_allowzero_stays() -> None:
    assert "Concat" in left(shaped(["n0", "k"], {"k": [12]}, ("N", 3, 4), allowzero=1), (2, 3, 4))


def test_an_output_of_another_shape_than_the_file_says_stays_valid() -> None:
    """The file states two axes, the model gives three; with a computed target nothing can tell."""
    nodes = [node("Shape", ["x"], ["s"]), node("Gather", ["s", "i"], ["n"])]
    nodes += [node("Concat", ["n", "one", "four"], ["t"], axis=0), node("Reshape", ["x", "t"], ["y"])]
    constants = {name: np.array([k]) for name, k in (("i", 0), ("one", 1), ("four", 4))}
    proto = model(nodes, constants, outputs=[value("y", shape=(1, "M"))])
    assert "Concat" in operators(cleaned(proto))
    honest = model(nodes, constants, outputs=[value("y", shape=("M", 1, 4))])
    assert "Concat" not in operators(cleaned(honest))


def test_sizes_through_32_bits() -> None:
    nodes = [node("Shape", ["x"], ["s"]), node("Cast", ["s"], ["c"], to=TensorProto.INT32)]
    nodes += [node("Slice", ["c", "i", "one"], ["n"]), node("Concat", ["n", "k"], ["t"], axis=0)]
    nodes += [node("Cast", ["t"], ["u"], to=TensorProto.INT64), node("Reshape", ["x", "u"], ["z"])]
    constants = {"i": np.array([0]), "one": np.array([1]), "k": np.array([12], "int32")}
    assert left(built(nodes, constants, ("N", 3, 4)), (2, 3, 4)) == ["Reshape", "Relu"]


def slices(*bounds: tuple[int, int, int, int]) -> onnx.ModelProto:
    """Slices in a row, each (start, end, axis, step)."""
    nodes, constants = [], dict[str, Any]()
    names = ["x", *(f"v{k}" for k in range(len(bounds) - 1)), "z"]
    for k, numbers in enumerate(bounds):
        keys = [f"{what}{k}" for what in "seap"]
        constants |= {key: np.array([number]) for key, number in zip(keys, numbers, strict=True)}
        nodes.append(node("Slice", [names[k], *keys], [names[k + 1]]))
    return built(nodes, constants, (3, 4))


def test_slices() -> None:
    assert left(slices((1, 3, 0, 1), (0, 4, 1, 2)), (3, 4)) == ["Slice", "Relu"]
    assert left(slices((1, 3, 0, 1), (0, 4, -1, 2)), (3, 4)) == ["Slice", "Relu"]
    assert left(slices((1, 3, 1, 1), (0, 1, 1, 1)), (3, 4)) == ["Slice", "Slice", "Relu"]
    assert left(slices((0, 4, 1, 1)), (3, 4)) == ["Relu"]
    assert left(slices((0, 2**31 - 1, 0, 1)), (3, 4)) == ["Relu"]
    for bound in ((0, 3, 1, 1), (1, 4, 1, 1), (0, 4, 1, 2), (0, -1, 1, 1)):
        assert left(slices(bound), (3, 4)) == ["Slice", "Relu"]


def test_pads() -> None:
    def padded(amounts: list[int]) -> onnx.ModelProto:
        return built([node("Pad", ["x", "p"], ["z"])], {"p": amounts}, (3, 4))

    assert left(padded([0, 0, 0, 0]), (3, 4)) == ["Relu"]
    assert left(padded([0, 0, 0, 1]), (3, 4)) == ["Pad", "Relu"]


def test_concats() -> None:
    inner = node("Concat", ["x", "k"], ["a"], axis=0)
    k: Array = np.ones((1, 4), "float32")
    assert left(built([inner, node("Concat", ["k", "a", "x"], ["z"], axis=0)], {"k": k}, ("N", 4)), (2, 4)) == [
        "Concat",
        "Relu",
    ]
    across = [inner, node("Concat", ["a", "a"], ["z"], axis=1)]
    assert left(built(across, {"k": k}, ("N", 4)), (2, 4)) == ["Concat", "Concat", "Relu"]
    twice = [inner, node("Concat", ["a", "a"], ["z"], axis=0)]
    assert left(built(twice, {"k": k}, ("N", 4)), (2, 4)) == ["Concat", "Concat", "Relu"]


@pytest.mark.parametrize(("index", "axes", "joined"), [(1, [1], True), (1, [0], False), ([1], [1], False)])
def test_one_entry_and_its_axis(index: Any, axes: list[int], joined: bool) -> None:
    nodes = [node("Gather", ["x", "i"], ["a"], axis=1), node("Unsqueeze", ["a", "axes"], ["z"])]
    found = left(built(nodes, {"i": index, "axes": axes}, ("N", 4)), (2, 4))
    assert found == (["Gather", "Relu"] if joined else ["Gather", "Unsqueeze", "Relu"])


@pytest.mark.parametrize(("state", "goes"), [(0.0, True), (-0.0, False), (1.0, False)])
def test_an_initial_state_of_zeros_goes(state: float, goes: bool) -> None:
    """It may be any view of a constant of zeros; -0 is another number."""
    constants: dict[str, Any] = {"w": np.ones((1, 4, 4), "float32"), "r": np.ones((1, 4, 4), "float32"), "n": [2, 3, 4]}
    fill = numpy_helper.from_array(np.array([state], "float32"))
    nodes = [node("ConstantOfShape", ["n"], ["h"], value=fill), node("Slice", ["h", "i", "one"], ["h1"])]
    nodes.append(node("RNN", ["x", "w", "r", "", "", "h1"], ["z"], hidden_size=4))
    found = left(built(nodes, constants | {"i": [0], "one": [1]}, (2, 3, 4)), (2, 3, 4))
    assert found == (["RNN", "Relu"] if goes else ["ConstantOfShape", "Slice", "RNN", "Relu"])


def test_short_lists_of_integers_are_folded() -> None:
    """Pad amounts that torch's exporter computes; a tensor of floats stays a size."""
    zero = numpy_helper.from_array(np.array([0], "int64"))
    nodes = [node("ConstantOfShape", ["n"], ["o"], value=zero), node("Concat", ["o", "one"], ["p"], axis=0)]
    nodes.append(node("Pad", ["x", "p"], ["z"]))
    assert left(built(nodes, {"n": [3], "one": [1]}, (3, 4)), (3, 4)) == ["Pad", "Relu"]
    assert stays(model([node("ConstantOfShape", ["s"], ["c"]), node("Add", ["x", "c"], ["y"])], {"s": np.array([4])}))


# --- a Transpose between a Reshape that merges axes and another ------------------------------------


def turned(
    merge: list[int], perm: list[int], split: list[int], shape: tuple[Any, ...], *more: onnx.NodeProto
) -> onnx.ModelProto:
    nodes = [
        node("Reshape", ["x", "m"], ["a"]),
        node("Transpose", ["a"], ["b"], perm=perm),
        node("Reshape", ["b", "s"], ["z"]),
    ]
    return built([*nodes, *more], {"m": merge, "s": split}, shape)


@pytest.mark.parametrize(
    ("merge", "perm", "split", "shape", "ops"),
    [
        ([-1, 5, 4], [0, 2, 1], [2, 3, 4, 5], (2, 3, 5, 4), ["Transpose"]),  # keys of an attention
        ([-1, 5, 4], [0, 2, 1], [-1, 3, 4, 5], ("N", 3, 5, 4), ["Transpose"]),  # of any batch
        ([0, 3, 20], [0, 2, 1], [0, 5, 4, 3], ("N", 3, 5, 4), ["Transpose"]),
        ([-1, 4], [1, 0], [4, -1, 3, 5], ("N", 3, 5, 4), ["Transpose"]),
        ([3, 20], [1, 0], [5, 4, 3], (1, 3, 5, 4), ["Transpose", "Reshape"]),  # the axis of size 1 goes
        ([-1, 5, 4], [0, 2, 1], [-1, 60], ("N", 3, 5, 4), ["Transpose", "Reshape"]),
        # no whole axes, so that entries of different axes mix
        ([-1, 4, 5], [0, 2, 1], [2, 3, 5, 4], (2, 3, 5, 4), ["Reshape", "Transpose", "Reshape"]),
        ([-1, 10, 4], [0, 2, 1], [2, 3, 4, 5], (2, 3, 5, 4), ["Reshape", "Transpose", "Reshape"]),
        ([6, 20], [1, 0], [4, 5, 3, 2], (2, 3, 5, 4), ["Transpose", "Reshape"]),
        ([0, -1, 4], [1, 0, 2], [-1, 4], ("N", "M", "L", 4), ["Transpose", "Reshape"]),  # one open product
        ([-1, 8], [1, 0], [4, 2, -1], ("N", "M", "L", 4), ["Reshape", "Transpose", "Reshape"]),  # two
    ],
)
def test_a_transpose_takes_merged_axes_together(
    merge: list[int], perm: list[int], split: list[int], shape: tuple[Any, ...], ops: list[str]
) -> None:
    proto = turned(merge, perm, split, shape)
    sizes = [tuple({"N": n, "M": 3, "L": 2}.get(d, d) for d in shape) for n in ((2, 3) if "N" in shape else (2,))]
    assert left(proto, *sizes) == [*ops, "Relu"]


def test_what_others_take_of_merged_axes_stays() -> None:
    for inner in ("a", "b"):
        proto = turned([-1, 5, 4], [0, 2, 1], [2, 3, 4, 5], (2, 3, 5, 4), node("Abs", [inner], ["other"]))
        proto.graph.output.append(value("other", shape=None))
        assert left(proto, (2, 3, 5, 4)).count("Reshape") == 2


# --- sizes of what nothing else needs -------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "index", "ops"),
    [
        (node("Reshape", ["x", "t"], ["a"]), [0], ["Shape", "Gather", "ConstantOfShape"]),
        (node("Reshape", ["x", "t"], ["a"]), [0, 1], ["Reshape", "Shape", "Gather", "ConstantOfShape"]),
        (node("Exp", ["x"], ["a"]), [0, 1], ["Shape", "Gather", "ConstantOfShape"]),
        (node("NonZero", ["x"], ["a"]), [1], ["NonZero", "Shape", "Gather", "ConstantOfShape"]),
        (node("Transpose", ["x"], ["a"], perm=[1, 0, 2]), [1], ["Transpose", "Shape", "Gather", "ConstantOfShape"]),
    ],
)
def test_sizes_are_taken_of_the_input(before: onnx.NodeProto, index: list[int], ops: list[str]) -> None:
    nodes = [before, node("Shape", ["a"], ["s"]), node("Gather", ["s", "i"], ["g"])]
    proto = built([*nodes, node("ConstantOfShape", ["g"], ["z"])], {"t": [0, -1], "i": index}, ("N", "M", 4))
    assert left(proto, (2, 3, 4), (5, 1, 4)) == [*ops, "Relu"]


# --- a Pad in front of a Conv ---------------------------------------------------------------------


def padded(amounts: list[int], fill: float | None = None, own: Any = None, **attributes: Any) -> onnx.ModelProto:
    nodes = [node("Pad", ["x", "p", *(["v"] if fill is not None else [])], ["a"], **attributes)]
    nodes.append(node("Conv", ["a", "w"], ["z"], **(own or {})))
    constants: dict[str, Any] = {"p": amounts, "w": RNG.standard_normal((4, 3, 3, 2)).astype("float32")}
    return built(nodes, constants | ({} if fill is None else {"v": np.float32(fill)}), (2, 3, 6, 5))


@pytest.mark.parametrize(
    ("amounts", "own", "made"),
    [
        ([0, 0, 1, 2, 0, 0, 3, 0], None, [1, 2, 3, 0]),
        ([0, 0, 0, 1, 0, 0, 1, 1], {"pads": [1, 0, 2, 1], "strides": [2, 1]}, [1, 1, 3, 2]),
        ([0, 0, 7, 9, 0, 0, 8, 4], {"dilations": [2, 1]}, [7, 9, 8, 4]),  # more than the kernel
    ],
)
def test_a_conv_pads_itself(amounts: list[int], own: Any, made: list[int]) -> None:
    for fill in (None, 0.0):
        proto = padded(amounts, fill, own)
        after = cleaned(proto)
        assert [op for op in operators(after) if op != "Constant"] == ["Conv", "Relu"]
        (conv,) = [n for n in after.graph.node if n.op_type == "Conv"]
        assert {a.name: list(a.ints) for a in conv.attribute}["pads"] == made
        feeds = {"x": RNG.standard_normal((2, 3, 6, 5)).astype("float32")}
        for one, other in zip(run(proto, feeds), run(after, feeds), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "proto",
    [
        padded([0, 0, 1, 1, 0, 0, 1, 1], 1.0),
        padded([0, 0, 1, 1, 0, 0, 1, 1], 1e-30),
        padded([0, 0, 2, 0, 0, 0, -1, 0]),
        padded([0, 0, 1, 1, 0, 0, 1, 1], mode="reflect"),
        padded([0, 0, 1, 1, 0, 0, 1, 1], mode="edge"),
        padded([1, 0, 1, 1, 0, 0, 1, 1]),  # the batch
        padded([0, 0, 1, 1, 0, 0, 1, 1], own={"auto_pad": "SAME_UPPER"}),
    ],
)
def test_other_pads_stay(proto: onnx.ModelProto) -> None:
    assert left(proto, (2, 3, 6, 5)) == ["Pad", "Conv", "Relu"]


def test_a_pad_that_others_need_stays() -> None:
    proto = padded([0, 0, 1, 1, 0, 0, 1, 1])
    proto.graph.node.append(node("Abs", ["a"], ["other"]))
    proto.graph.output.append(value("other", shape=None))
    assert "Pad" in left(proto, (2, 3, 6, 5))


# --- sizes behind pools that round up --------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "attributes", "known"),
    [
        (8, {"kernel_shape": [2], "strides": [2]}, True),
        (9, {"kernel_shape": [2], "strides": [2]}, False),  # rounded up
        (9, {"kernel_shape": [3], "strides": [2], "pads": [1, 1]}, True),
        (8, {"kernel_shape": [3], "strides": [2], "pads": [1, 1]}, False),
        (9, {"kernel_shape": [2], "strides": [3], "dilations": [2]}, True),
    ],
)
def test_sizes_that_a_pool_need_not_round_are_known(size: int, attributes: Any, known: bool) -> None:
    nodes = [
        node("MaxPool", ["x"], ["a"], ceil_mode=1, **attributes),
        node("Shape", ["a"], ["s"]),
        node("ConstantOfShape", ["s"], ["c"]),
        node("Add", ["a", "c"], ["z"]),
    ]
    assert ("Shape" not in left(built(nodes, {}, (1, 2, size)), (1, 2, size))) == known
