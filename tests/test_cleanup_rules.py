"""Every rule of clean-up with a model inside its condition, which it changes, and models just outside, which stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.cleaning import AWKWARD, Array, cleaned, model, node, operators, run, same_bits, value

F, F16, BF16, F64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE
I64, I32, I16, I8, U8 = (getattr(TensorProto, name) for name in ("INT64", "INT32", "INT16", "INT8", "UINT8"))
BOOL, TEXT = TensorProto.BOOL, TensorProto.STRING
X = {"x": AWKWARD.reshape(3, 4)}


def stays(proto: onnx.ModelProto, **options: Any) -> bool:
    return operators(cleaned(proto, **options)) == operators(proto)


def scalar(number: Any, dtype: str = "float32") -> Array:
    return np.array(number, dtype)


# --- neutral elements -------------------------------------------------------------------------------


def arithmetic(op: str, number: Array, *, left: bool = False, last: str = "Relu", **given: Any) -> onnx.ModelProto:
    inputs = ["c", "x"] if left else ["x", "c"]
    return model([node(op, inputs, ["a"]), node(last, ["a"], ["y"])], {"c": number}, **given)


@pytest.mark.parametrize(
    ("op", "number", "left"),
    [
        ("Add", scalar(0.0), False),
        ("Add", scalar(0.0), True),
        ("Add", scalar(-0.0), False),
        ("Sub", scalar(0.0), False),
        ("Sub", scalar(-0.0), False),
        ("Mul", scalar(1.0), False),
        ("Mul", scalar(1.0), True),
        ("Div", scalar(1.0), False),
        ("Mul", np.ones((1, 1), "float32"), False),
        ("Add", np.zeros(1, "float32"), True),
    ],
)
def test_neutral_elements_go(op: str, number: Array, left: bool) -> None:
    proto = arithmetic(op, number, left=left, last="Abs")
    after = cleaned(proto)
    assert operators(after) == ["Abs"]
    assert same_bits(run(proto, X), run(after, X))


@pytest.mark.parametrize(
    ("op", "number", "left"),
    [
        ("Add", scalar(1e-10), False),
        ("Add", scalar(1e-45), False),
        ("Add", scalar(-1e-30), True),
        ("Sub", scalar(1e-12), False),
        ("Sub", scalar(0.0), True),  # 0 - x
        ("Mul", scalar(np.float32(1) + np.float32(1.2e-7)), False),
        ("Mul", scalar(np.nextafter(np.float32(1), np.float32(0))), False),
        ("Mul", scalar(-1.0), False),
        ("Mul", scalar(0.0), False),
        ("Mul", scalar(np.nan), False),
        ("Div", scalar(1.0), True),  # 1 / x
        ("Div", scalar(np.nextafter(np.float32(1), np.float32(2))), False),
        ("Add", scalar(np.nan), False),
        ("Add", np.zeros((2, 1, 1), "float32"), False),  # more entries
        ("Add", np.zeros((1, 1, 1), "float32"), False),  # a new axis
        ("Mul", np.ones((1, 1, 1), "float32"), True),
        ("Mul", np.ones(4, "float32"), False),  # a parameter with an entry for each unit
    ],
)
def test_what_is_not_quite_neutral_stays(op: str, number: Array, left: bool) -> None:
    proto = arithmetic(op, number, left=left, last="Abs")
    after = cleaned(proto)
    assert operators(after) == [op, "Abs"]
    assert same_bits(run(proto, X), run(after, X))


def test_scalars_of_an_unknown_rank() -> None:
    """One entry with an axis adds an axis to a scalar: only without axes is it neutral to what has no known rank."""
    for number, goes in ((scalar(1.0), True), (np.ones(1, "float32"), False)):
        nodes = [node("Reshape", ["x", "s"], ["r"]), node("Mul", ["r", "c"], ["a"]), node("Abs", ["a"], ["y"])]
        inputs = [value("x", shape=None), value("s", I64, None)]
        proto = model(nodes, {"c": number}, inputs=inputs)
        assert ("Mul" not in operators(cleaned(proto))) == goes
        feeds = {"x": np.ones(1, "float32"), "s": np.zeros(0, "int64")}
        assert same_bits(run(proto, feeds), run(cleaned(proto), feeds))


@pytest.mark.parametrize("last", ["Reciprocal", "Div", "Pow"])
def test_the_sign_of_zero_counts_before_a_division(last: str) -> None:
    """-0 + 0 is 0, and 1 / 0 is not 1 / -0; -0 + -0 and -0 - 0 are -0 as before."""
    inputs = {"Reciprocal": ["b"], "Div": ["x", "b"], "Pow": ["b", "p"]}[last]
    for op, zero, goes in (("Add", 0.0, 0), ("Add", -0.0, 1), ("Sub", 0.0, 1), ("Sub", -0.0, 0)):
        nodes = [node(op, ["x", "c"], ["a"]), node("Neg", ["a"], ["b"]), node(last, inputs, ["y"])]
        proto = model(nodes, {"c": scalar(zero), "p": scalar(-1.0)})
        after = cleaned(proto)
        assert (op not in operators(after)) == bool(goes)
        assert same_bits(run(proto, X), run(after, X))


def test_unknown_operators_may_divide() -> None:
    nodes = [node("Add", ["x", "c"], ["a"]), node("Gelu", ["a"], ["y"], domain="com.microsoft")]
    proto = model(nodes, {"c": scalar(0.0)})
    proto.opset_import.add(domain="com.microsoft", version=1)
    assert stays(proto)


@pytest.mark.parametrize(("dtype", "elem"), [("int64", I64), ("int32", I32), ("float64", F64), ("float16", F16)])
def test_other_types(dtype: str, elem: int) -> None:
    feeds = {"x": np.array([[-3, 0, 5, 7]]).astype(dtype)}
    for op, number, goes in (
        ("Add", 0, True),
        ("Div", 1, True),
        ("Mul", 1, True),
        ("Add", 1, False),
        ("Div", 2, False),
    ):
        proto = arithmetic(op, scalar(number, dtype), last="Abs", inputs=[value("x", elem)], outputs=[value("y", elem)])
        after = cleaned(proto)
        assert (op not in operators(after)) == goes
        assert same_bits(run(proto, feeds), run(after, feeds))


def test_half_precision_epsilon() -> None:
    """The smallest half is 6e-8: nothing below a tolerance there either."""
    proto = arithmetic("Add", scalar(6e-8, "float16"), last="Log", inputs=[value("x", F16)], outputs=[value("y", F16)])
    assert stays(proto)


def test_old_broadcasting_stays() -> None:
    nodes = [node("Add", ["x", "c"], ["a"], broadcast=1, axis=0), node("Relu", ["a"], ["y"])]
    assert stays(model(nodes, {"c": np.zeros(1, "float32")}, opset=6))


# --- casts ------------------------------------------------------------------------------------------


def casts(source: int, *targets: int) -> onnx.ModelProto:
    names = ["x", *(f"v{k}" for k in range(len(targets) - 1)), "y"]
    nodes = [node("Cast", [a], [b], to=t) for a, b, t in zip(names, names[1:], targets, strict=False)]
    return model(nodes, inputs=[value("x", source)], outputs=[value("y", targets[-1], None)])


def test_a_cast_to_the_same_type_goes() -> None:
    for elem in (F, F16, I64, BOOL, TEXT):
        proto = model(
            [node("Cast", ["x"], ["a"], to=elem), node("Size", ["a"], ["y"])],
            inputs=[value("x", elem)],
            outputs=[value("y", I64, None)],
        )
        assert operators(cleaned(proto)) == ["Size"]
    like = [node("CastLike", ["x", "c"], ["a"]), node("Relu", ["a"], ["y"])]
    assert operators(cleaned(model(like, {"c": scalar(3.0)}))) == ["Relu"]
    assert "CastLike" in operators(cleaned(model(like, {"c": scalar(3.0, "float16")}, outputs=[value("y", F16, None)])))


KEEPING = [(F16, F, F16), (F16, F, BF16), (F, F64, F16), (F16, F64, F), (I8, F, F16), (BOOL, F, I64), (I16, F, I32)]
KEEPING += [(I32, I64, I8), (I32, F64, F), (U8, I32, I8)]
LOSING = [(F64, F, F16), (F, F16, F), (F, I64, F), (I64, F, F16), (I32, F, F16), (F, BF16, F16), (BF16, F16, F)]
LOSING += [(I16, F16, F), (F, F64, I32), (I64, I32, I64), (I16, F, I8), (F, BOOL, F), (I8, U8, I32), (F, TEXT, F)]


@pytest.mark.parametrize("chain", KEEPING)
def test_two_casts_become_one_where_the_first_loses_nothing(chain: tuple[int, ...]) -> None:
    proto = casts(*chain)
    after = cleaned(proto)
    assert operators(after) == ["Cast"]  # to the output, also where nothing is left to convert
    feeds = {"x": np.array([[0, 1, 100, 77]]).astype(helper.tensor_dtype_to_np_dtype(chain[0]))}
    if BF16 not in chain:
        assert same_bits(run(proto, feeds), run(after, feeds))


@pytest.mark.parametrize("chain", LOSING)
def test_casts_through_a_type_that_loses_stay(chain: tuple[int, ...]) -> None:
    assert operators(cleaned(casts(*chain))) == ["Cast", "Cast"]


def test_double_rounding_is_real() -> None:
    """The control of the case above: by float, a double rounds twice on its way to half precision."""
    one = np.array([1 + 2.0**-11 + 2.0**-40])
    assert one.astype("float32").astype("float16") != one.astype("float16")


# --- shapes -----------------------------------------------------------------------------------------


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


# --- constants -------------------------------------------------------------------------------------------


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
    assert np.array_equal(run(after, X)[0], AWKWARD.reshape(3, 4) * np.arange(4, dtype=np.float32), equal_nan=True)
