"""Verification finds inputs that take branches which data and random inputs leave out: modes, flags, sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper
from tests.models.control_flow_models import Body, made
from tests.runtime.test_control_flow_verify import planted

import cipm_ir
from cipm_ir.runtime.verification.modes import mode_values
from cipm_ir.runtime.verification.verify import verify_models

F, INT, B = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
X, OUT = ("x", F, ["N", "T"]), [("y", F, ["N", 3])]
Input = tuple[str, int, list[int]]
MODE: Input = ("mode", INT, [])
OTHER: Input = ("other", TensorProto.INT32, [1])
FLAG: Input = ("flag", B, [])


def branch(main: Body, prefix: str, width: int) -> Body:
    """A body with hidden units on the input of the model, which must be as wide as ``width``."""
    body = Body(main.rng)
    body.mlp("x", "out", prefix, (width, 5, 3))
    return body


def chosen(decide: Callable[[Body], str], inputs: Sequence[Input], widths: tuple[int, int] = (6, 6)) -> onnx.ModelProto:
    """An If between two bodies."""
    main = Body(np.random.default_rng(0))
    branches = branch(main, "a", widths[0]), branch(main, "b", widths[1])
    main.either(decide(main), "y", branches, "out", 3)
    return made(main.graph([X, *inputs], OUT))


def equal(number: int, name: str = "mode") -> Callable[[Body], str]:
    return lambda main: main.op("Equal", [name, main.number(f"n{number}", np.int64(number))], f"is{number}")


def less(main: Body) -> str:
    main.op("Cast", ["other"], "wide", to=INT)
    main.op("Squeeze", ["wide"], "one")
    return main.op("Less", [main.number("limit", np.int64(-40)), "one"], "go")


def both(main: Body) -> str:
    return main.op("And", [equal(7)(main), "flag"], "go")


def odd(main: Body) -> str:
    main.op("Mod", ["mode", main.number("four", np.int64(4))], "rest")
    return main.op("Equal", ["rest", main.number("three", np.int64(3))], "go")


def far(main: Body) -> str:
    main.op("Sub", [main.number("ten", np.int64(10)), "mode"], "left")
    main.op("Mul", ["left", main.number("two", np.int64(2))], "double")
    return main.op("Greater", ["double", main.number("most", np.int64(50))], "go")


def by_size(main: Body) -> str:
    main.op("Shape", ["x"], "shape")
    main.op("Gather", ["shape", main.number("first", np.int64(0))], "count")
    return main.op("Less", ["count", main.number("few", np.int64(2))], "go")


def nested() -> onnx.ModelProto:
    """Three bodies: of mode 3, inside it of a second mode."""
    main = Body(np.random.default_rng(0))
    inner = Body(main.rng)
    inner.op("Squeeze", ["other"], "one")
    inner.op("Equal", ["one", inner.number("five", np.int32(5))], "five_it_is")
    inner.either("five_it_is", "out", (branch(main, "a", 6), branch(main, "b", 6)), "out", 3)
    for node in inner.nodes:  # the branches' result has the name of theirs
        if node.op_type == "If":
            node.output[0] = "mid"
    inner.op("Identity", ["mid"], "out")
    main.either(equal(3)(main), "y", (inner, branch(main, "c", 6)), "out", 3)
    return made(main.graph([X, MODE, OTHER], OUT))


# Each with what the data says, and how many matrices its bodies hold.
CASES: dict[str, tuple[onnx.ModelProto, dict[str, int], int]] = {
    "equal": (chosen(equal(16000), [MODE]), {"mode": 16000}, 4),
    "equal, other sizes": (chosen(equal(16000), [MODE], (6, 3)), {"mode": 16000}, 4),
    "equal, sizes of weights": (chosen(equal(16000), [MODE], (6, 11)), {"mode": 16000}, 4),
    "less": (chosen(less, [OTHER]), {"other": 1}, 4),
    "flag": (chosen(lambda _: "flag", [FLAG]), {"flag": True}, 4),
    "both": (chosen(both, [MODE, FLAG]), {"mode": 0, "flag": False}, 4),
    "odd": (chosen(odd, [MODE]), {"mode": 0}, 4),
    "far": (chosen(far, [MODE]), {"mode": 0}, 4),
    "size": (chosen(by_size, []), {}, 4),
    "nested": (nested(), {"mode": 1, "other": 2}, 6),
}
KINDS: dict[str, type] = {"mode": np.int64, "other": np.int32, "flag": np.bool_}


def data_of(given: dict[str, int]) -> list[dict[str, np.ndarray]]:
    x = np.random.default_rng(1).standard_normal((8, 6)).astype(np.float32)
    small: dict[str, np.ndarray] = {
        name: np.full((1,) if name == "other" else (), value, KINDS[name]) for name, value in given.items()
    }
    return [{"x": x, **small}]


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_weight_in_any_branch_is_found(name: str) -> None:
    proto, given, matrices = CASES[name]
    model, data = ir.from_proto(proto), data_of(given)
    same = verify_models(model, model, data=data)
    assert same.ok and not same.unrun, str(same)
    for weight in range(matrices):
        found = verify_models(model, planted(proto, weight, 1.001), data=data)
        assert found.ok is False and "is taken" not in found.reason, (weight, str(found))


def test_values_are_those_around_the_constants() -> None:
    known = {name: mode_values(ir.from_proto(proto)) for name, (proto, _, _) in CASES.items()}
    assert known["equal"] == {"mode": [16000, 16001, 15999]}
    assert set(known["less"]["other"]) == {-40, -39, -41}
    assert known["flag"] == {"flag": [0, 1]}
    assert 3 in known["odd"]["mode"] and -15 in known["far"]["mode"]
    assert known["size"] == {}


def test_inputs_that_decide_nothing_are_left_alone() -> None:
    """A table's index, and a comparison that no If depends on."""
    main = Body(np.random.default_rng(0))
    main.op("Equal", ["mode", main.number("n", np.int64(9))], "is")
    main.op("Cast", ["is"], "number", to=F)
    main.op("MatMul", ["x", main.weight("w", 6, 3)], "p")
    main.op("Mul", ["p", "number"], "y")
    assert mode_values(ir.from_proto(made(main.graph([X, MODE], OUT)))) == {}


def test_a_branch_that_no_value_takes_is_still_forced() -> None:
    def never(main: Body) -> str:
        return main.op("And", [equal(3)(main), equal(4)(main)], "go")

    proto = chosen(never, [MODE])
    model = ir.from_proto(proto)
    found = verify_models(model, planted(proto, 2, 1.001), data=data_of({"mode": 0}))
    assert found.ok is False and "is taken" in found.reason, str(found)


def test_the_batch_may_stand_on_another_axis() -> None:
    """A state of (2, N, 6) beside an input of (N, T), without names."""
    main = Body(np.random.default_rng(0))
    main.op("Gather", ["state", main.number("zero", np.int64(0))], "h")
    main.op("Expand", ["h", main.number("sizes", np.array([1, 6]))], "wide")
    main.op("Concat", ["x", "wide"], "all", axis=1)
    main.op("MatMul", ["all", main.weight("w", 14, 3)], "y")
    graph = main.graph([("x", F, [None, None]), ("state", F, [2, None, 6])], [("y", F, [None, 3])])
    proto = made(graph)
    model = ir.from_proto(proto)
    assert verify_models(model, model).ok
    wrong = onnx.ModelProto()
    wrong.CopyFrom(proto)
    weight = next(t for t in wrong.graph.initializer if t.name == "w")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.001), "w"))
    assert verify_models(model, ir.from_proto(wrong)).ok is False
    assert not any(value.meta for value in model.graph.inputs)


def of_width(width: int) -> Body:
    """A body whose products fit one width of the input only."""
    body = Body(np.random.default_rng(0))
    body.mlp("x", "out", f"w{width}", (width, width, 3))
    return body


@pytest.mark.parametrize(("sizes", "macs", "left_out"), [(6, 6 * 6 + 6 * 3, 1), (11, 11 * 11 + 11 * 3, 1)])
def test_a_branch_that_cannot_run_at_the_sizes_costs_nothing(sizes: int, macs: int, left_out: int) -> None:
    main = Body(np.random.default_rng(0))
    main.either(equal(3)(main), "y", (of_width(6), of_width(11)), "out", 3)
    program = cipm_ir.load(made(main.graph([X, MODE], OUT)))
    found = program.count({"N": 1, "T": sizes})
    assert (found.total, found.unknown, found.left_out) == (macs, (), left_out)


def test_the_dearer_branch_counts_where_both_can_run() -> None:
    main = Body(np.random.default_rng(0))
    small = Body(np.random.default_rng(0))
    small.op("MatMul", ["x", small.weight("m", 6, 3)], "out")
    main.either(equal(3)(main), "y", (of_width(6), small), "out", 3)
    found = cipm_ir.load(made(main.graph([X, MODE], OUT))).count({"N": 1, "T": 6})
    assert (found.total, found.left_out) == (6 * 6 + 6 * 3, 0)


def test_neither_branch_is_left_out_where_none_can_run() -> None:
    main = Body(np.random.default_rng(0))
    main.either(equal(3)(main), "y", (of_width(6), of_width(11)), "out", 3)
    found = cipm_ir.load(made(main.graph([X, MODE], OUT))).count({"N": 1, "T": 7})
    assert found.unknown and not found.left_out
