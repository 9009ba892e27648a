"""Clean-up of arithmetic and casts: a model inside the condition of each rule, and models just outside, which stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tests.models.cleaning import AWKWARD, Array, cleaned, model, node, operators, run, same_bits, scalar, stays, value

F, F16, BF16, F64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE
I64, I32, I16, I8, U8 = (getattr(TensorProto, name) for name in ("INT64", "INT32", "INT16", "INT8", "UINT8"))
BOOL, TEXT = TensorProto.BOOL, TensorProto.STRING
X = {"x": AWKWARD.reshape(3, 4)}


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


@pytest.mark.parametrize("last", ["Cast", "CastLike"])
def test_the_sign_of_zero_counts_in_text(last: str) -> None:
    """-0 is written "-0", and -0 + 0 "0"."""
    given = {"Cast": (["a"], {"to": TEXT}), "CastLike": (["a", "text"], {})}[last]
    for zero, goes in ((0.0, False), (-0.0, True)):
        nodes = [node("Add", ["x", "c"], ["a"]), node(last, given[0], ["y"], **given[1])]
        inputs = [value("x"), value("text", TEXT, (1,))]
        after = cleaned(model(nodes, {"c": scalar(zero)}, inputs=inputs, outputs=[value("y", TEXT, None)]))
        assert (operators(after) == [last]) == goes


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
