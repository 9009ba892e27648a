"""The yardstick of verification: the model's own rounding per channel, inputs of many kinds, saturated outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import cipm_ir
from cipm_ir.runtime.session import run
from cipm_ir.runtime.verification.compare import Reference
from cipm_ir.runtime.verification.endings import endings
from cipm_ir.runtime.verification.noise import Yardstick, by_channel, nudged, nudged_model, settle
from cipm_ir.runtime.verification.verify import Verifier, verify_models

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
Array = NDArray[Any]
RNG = np.random.default_rng(0)
W = RNG.standard_normal((6, 8)).astype(np.float32)
V = RNG.standard_normal((8, 4)).astype(np.float32)


def model(
    nodes: list[tuple[str, list[str], str] | onnx.NodeProto],
    tensors: dict[str, Any],
    *,
    x: tuple[int, list[Any]] = (FLOAT, ["N", 6]),
    y: tuple[int, int] = (FLOAT, 2),
    inputs: dict[str, list[int]] | None = None,
    opset: int = 18,
    ir_version: int = 9,
) -> ir.Model:
    made = [helper.make_node(n[0], n[1], [n[2]]) if isinstance(n, tuple) else n for n in nodes]
    info = helper.make_tensor_value_info
    given = [info("x", *x), *(info(name, FLOAT, shape) for name, shape in (inputs or {}).items())]
    arrays = [numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()]
    graph = helper.make_graph(made, "g", given, [info("y", y[0], [None] * y[1])], arrays)
    imports = [helper.make_opsetid("", opset)]
    return ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=ir_version))


def product(w: Array = W, *ends: str, bias: Any = 0.0, **attributes: Any) -> ir.Model:
    """x @ w + bias, then some operators of one input."""
    names = ["z", *(f"e{k}" for k in range(len(ends) - 1)), "y"] if ends else ["y"]
    nodes: list[Any] = [("MatMul", ["x", "w"], "p"), ("Add", ["p", "b"], names[0])]
    for op, before, after in zip(ends, names, names[1:], strict=False):
        nodes.append(helper.make_node(op, [before], [after], **attributes.get(op, {})))
    return model(nodes, {"w": w, "b": np.float32(bias)})


# --- moved by rounding ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_an_entry_moves_by_at_most_a_unit_in_the_last_place(dtype: Any) -> None:
    array = RNG.standard_normal((40, 50)).astype(dtype)
    array[0, :3] = [0, np.inf, np.nan]
    moved = nudged(array, np.random.default_rng(1))
    assert moved.dtype == array.dtype and moved is not array
    np.testing.assert_array_equal(moved[0, :3].astype(float), array[0, :3].astype(float))
    plain, other = array.astype(np.float64).ravel()[3:], moved.astype(np.float64).ravel()[3:]
    step = np.abs(other - plain) / np.abs(plain)
    resolution = float(ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]
    assert step.max() <= resolution * 1.001 and 0.3 < (step > 0).mean() < 0.7
    assert (other > plain).any() and (other < plain).any()


def test_the_largest_number_does_not_become_infinite() -> None:
    largest = np.full(1000, np.finfo(np.float32).max, np.float32)
    largest[::7] = -1e-3
    assert np.isfinite(nudged(largest, np.random.default_rng(0))).all()


@pytest.mark.parametrize("array", [[1.0, 0.0, 1.0, -10000.0], [0.5], [0.0, -np.inf, 0.0], [1.0] * 5000])
def test_masks_and_short_constants_stay(array: list[float]) -> None:
    given = np.array(array, np.float32)
    assert np.array_equal(nudged(given, np.random.default_rng(0)), given)


def test_sums_run_in_another_order_and_give_the_same() -> None:
    nodes: list[Any] = [
        helper.make_node("Conv", ["x", "k"], ["c"]),
        helper.make_node("Flatten", ["c"], ["f"]),
        helper.make_node("Gemm", ["f", "g"], ["h"], transB=1),
        ("MatMul", ["h", "s"], "i"),
        ("MatMul", ["i", "s"], "j"),
        ("MatMul", ["j", "m"], "y"),
    ]
    shapes = {"k": (5, 4, 3, 3), "g": (7, 20), "m": (7, 3), "s": (7, 7)}
    tensors = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    plain = model(nodes, tensors, x=(FLOAT, ["N", 4, 4, 4]))
    other = nudged_model(plain, (0, 1))
    read = [node.inputs[0].name for node in other.graph if node.op_type == "Gather" and node.inputs[0]]
    assert sorted(map(str, read)) == ["f", "h", "i", "j", "s", "s", "x"]  # weights of one node are stored so
    moved = {name: value.const_value.numpy() for name, value in other.graph.initializers.items() if value.const_value}
    for name, axis in (("k", 1), ("g", 1), ("m", 0)):
        before, after = np.abs(tensors[name]), np.abs(moved[name])
        assert not np.allclose(after, before) and np.allclose(np.sort(after, axis), np.sort(before, axis))
    assert np.allclose(moved["s"], tensors["s"])
    x = RNG.standard_normal((2, 4, 4, 4)).astype(np.float32)
    a, b = run(plain, {"x": x})["y"], run(other, {"x": x})["y"]
    assert 0 < np.abs(a - b).max() < 1e-5 * np.abs(a).max()


# --- channels -------------------------------------------------------------------------------------


def test_noise_is_that_of_the_channel() -> None:
    stick = Yardstick(np.array([[1e6, 1.0], [-2e6, 0.5]], np.float32))
    stick.add(np.array([[1e6 + 1, 1.0], [-2e6, 0.5 + 1e-6]], np.float32))
    np.testing.assert_allclose(stick.noise[1], [1, 1e-6], rtol=0.1)
    large, small = stick.allowed(1)
    assert large > 4 and small < 5e-6
    image = Yardstick(np.zeros((2, 3, 5, 7), np.float32))
    assert set(image.noise) == {1, 3} and image.noise[1].shape == (3,) and image.noise[3].shape == (7,)
    assert by_channel(np.arange(6.0).reshape(2, 3), 1).tolist() == [3, 4, 5]


def test_a_channel_that_looks_quiet_once_is_as_loud_as_it_is_on_other_inputs() -> None:
    sticks = [Yardstick(np.array([[100.0]], np.float32)) for _ in range(5)]
    for stick in sticks[1:]:
        stick.add(np.array([[100.1]], np.float32))
    assert sticks[0].noise[1][0] == 0
    settle(sticks)
    assert sticks[0].noise[1][0] == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(("scale", "ok"), [(1.0, True), (1.01, False), (3.0, False)])
def test_a_small_column_beside_a_large_one(scale: float, ok: bool) -> None:
    sizes = np.array([1e6, 1, 1, 1], np.float32)
    assert (
        bool(
            verify_models(product(W[:, :4] * sizes), product(W[:, :4] * sizes * np.array([1, 1, 1, scale], np.float32)))
        )
        is ok
    )


def test_a_saturated_output_is_judged_by_its_rounding() -> None:
    """A sigmoid near 1e-7 is good to 1e-7 only; folding in front of it must not be refused."""
    order = RNG.permutation(8)
    hidden = [("MatMul", ["x", "w"], "h"), ("Relu", ["h"], "r"), ("MatMul", ["r", "v"], "p"), ("Add", ["p", "b"], "z")]
    nodes: list[Any] = [*hidden, ("Sigmoid", ["z"], "y")]
    tensors = {"w": W, "v": V, "b": np.float32(-16)}
    moved = {"w": W[:, order], "v": V[order], "b": np.float32(-16)}
    assert verify_models(model(nodes, tensors), model(nodes, moved)).ok


# --- behind a last activation ---------------------------------------------------------------------


@pytest.mark.parametrize("ends", [("Sigmoid",), ("Softmax",), ("Clip",), ("Sigmoid", "Round"), ("ArgMax",), ("Tanh",)])
def test_what_a_saturated_output_hides_is_seen(ends: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores are far outside of what the output resolves."""
    scores = np.array([[100, 0, -100, -200]], np.float32)
    attributes = {"ArgMax": {"axis": 1}}
    kind = INT64 if "ArgMax" in ends else FLOAT
    made = []
    for off in (1.0, 1.001):
        one = product(W[:, :4] * np.array([1, 1, off, 1], np.float32), *ends, **attributes)
        one.graph.initializers["b"].const_value = ir.tensor(scores, name="b")
        if "Clip" in ends:
            (clip,) = (node for node in one.graph if node.op_type == "Clip")
            for name, bound in (("low", -1e-3), ("high", 1e-3)):
                value = ir.Value(name=name, const_value=ir.tensor(np.float32(bound), name=name))
                one.graph.register_initializer(value)
                clip.resize_inputs(len(clip.inputs) + 1)
                clip.replace_input_with(len(clip.inputs) - 1, value)
        one.graph.outputs[0].dtype = ir.DataType(kind)
        made.append(one)
    found = verify_models(*made)
    assert found.ok is False and any("<" in name and worst[0] > 0 for name, worst in found.outputs.items())
    monkeypatch.setattr("cipm_ir.runtime.verification.verify.endings", lambda _: [])
    few = Verifier(made[0], cases=2).check(made[1])
    assert few.ok  # without a look behind the activation the same runs show nothing


def test_a_common_shift_in_front_of_softmax_is_no_difference() -> None:
    assert verify_models(product(W, "Softmax"), product(W, "Softmax", bias=3.0)).ok
    assert not verify_models(product(W, "Sigmoid"), product(W, "Sigmoid", bias=3.0)).ok


def test_different_values_that_a_clip_makes_equal_are_no_difference() -> None:
    """Relu and then Relu is Relu; only where the same operator stands in front are its values compared."""
    assert verify_models(product(W, "Relu", "Relu"), product(W, "Relu")).ok
    assert [one.name for one in endings(product(W, "Relu", "Sigmoid"))] == ["y < Sigmoid", "y < Sigmoid < Relu"]


# --- inputs ---------------------------------------------------------------------------------------


def embedding(table: Array) -> ir.Model:
    return model([("Gather", ["t", "x"], "y")], {"t": table}, x=(INT64, ["N", "T"]), y=(FLOAT, 3))


@pytest.mark.parametrize("row", [0, 1, 431, 999])
def test_every_row_of_a_table_is_reached(row: int) -> None:
    table = RNG.standard_normal((1000, 3)).astype(np.float32)
    other = table.copy()
    other[row, 1] *= np.float32(1.001)
    assert verify_models(embedding(table), embedding(table.copy())).ok
    assert verify_models(embedding(table), embedding(other)).ok is False


@pytest.mark.parametrize("row", [0, 1, 431, 499])
def test_every_row_of_a_table_is_reached_at_a_fixed_size(row: int) -> None:
    table = RNG.standard_normal((500, 3)).astype(np.float32)
    other = table.copy()
    other[row, 1] *= np.float32(1.001)
    made = [model([("Gather", ["t", "x"], "y")], {"t": t}, x=(INT64, [2, 16]), y=(FLOAT, 3)) for t in (table, other)]
    assert verify_models(made[0], made[0]).ok
    assert verify_models(*made).ok is False


@pytest.mark.parametrize("epsilon", [0.0, 1e-9])
def test_silence_is_an_input(epsilon: float) -> None:
    """log(|x| + 1e-10) differs from its neighbours at 0 only."""

    def log(shift: float) -> ir.Model:
        nodes: list[Any] = [("Abs", ["x"], "a"), ("Add", ["a", "e"], "s"), ("Log", ["s"], "y")]
        return model(nodes, {"e": np.float32(shift)})

    assert verify_models(log(1e-10), log(1e-10)).ok
    assert verify_models(log(1e-10), log(epsilon)).ok is False


def test_whole_numbers_at_the_ends_of_their_range_are_inputs() -> None:
    def only(edge: int) -> ir.Model:
        nodes: list[Any] = [("Equal", ["x", "e"], "q"), helper.make_node("Cast", ["q"], ["y"], to=FLOAT)]
        return model(nodes, {"e": np.array(edge, np.uint8)}, x=(TensorProto.UINT8, ["N", 1]))

    for edge in (0, 255):
        assert verify_models(only(edge), only(edge ^ 255)).ok is False


def test_an_input_with_a_default_takes_other_values() -> None:
    """A weight of the caller's choice: a model that folded its default is another model."""
    nodes: list[Any] = [("MatMul", ["x", "w"], "h"), ("MatMul", ["h", "v"], "y")]
    open_one = model(nodes, {"w": W, "v": V}, inputs={"v": [8, 4]})
    assert verify_models(open_one, open_one).ok
    closed = model(nodes, {"w": W, "v": V})
    assert "default" in verify_models(open_one, closed).reason
    order = RNG.permutation(8)
    moved = model(nodes, {"w": W[:, order], "v": V[order]}, inputs={"v": [8, 4]})
    assert verify_models(open_one, moved).ok is False
    assert verify_models(model(nodes, {"w": W, "v": V}), model(nodes, {"w": W[:, order], "v": V[order]})).ok
    # In files of IR version 3 every initializer is an input, and none is meant to be replaced.
    old: dict[str, Any] = {"inputs": {"w": [6, 8], "v": [8, 4]}, "ir_version": 3, "opset": 8}
    permuted = {"w": W[:, order], "v": V[order]}
    assert verify_models(model(nodes, {"w": W, "v": V}, **old), model(nodes, permuted, **old)).ok


# --- coarse grids inside the model ----------------------------------------------------------------


def test_jumps_between_the_steps_of_a_grid_are_rounding() -> None:
    """Scores beside a mask of -10000 are whole multiples of a thousandth; a gauge may move one of them by a step."""
    nodes: list[Any] = [
        ("MatMul", ["x", "w"], "h"),
        ("MatMul", ["h", "v"], "s"),
        ("Add", ["s", "mask"], "m"),
        ("Sub", ["m", "mask"], "y"),
    ]
    mask = np.float32(-1e4)
    original = model(nodes, {"w": W, "v": V, "mask": mask})
    for seed in range(8):
        order = np.random.default_rng(seed).permutation(8)
        assert verify_models(original, model(nodes, {"w": W[:, order], "v": V[order], "mask": mask})).ok
    # Several steps at once are none.
    assert verify_models(original, model(nodes, {"w": W, "v": V * np.float32(1.01), "mask": mask})).ok is False


# --- cost -----------------------------------------------------------------------------------------


def test_a_model_runs_five_times_and_only_where_bits_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[str] = []
    measure = Reference._measure_noise

    def count(reference: Reference, found: Sequence[str], places: Sequence[int]) -> None:
        ways.extend(found)
        measure(reference, found, places)

    monkeypatch.setattr(Reference, "_measure_noise", count)
    assert verify_models(product(), product()).ok and not ways
    order = RNG.permutation(6)
    nodes: list[Any] = [("Gather", ["x", "o"], "g"), ("MatMul", ["g", "w"], "h"), ("MatMul", ["h", "v"], "y")]
    plain: list[Any] = [("MatMul", ["x", "w"], "h"), ("MatMul", ["h", "v"], "y")]
    verify_models(model(plain, {"w": W * 99, "v": V}), model(plain, {"w": W, "v": V * np.float32(99)}))
    assert len(ways) <= 4
    other = verify_models(model(plain, {"w": W, "v": V}), model(nodes, {"w": W[order], "v": V, "o": order}))
    assert other.ok is False or other.share <= 1


def test_a_promise_of_equal_bits_is_kept_to() -> None:
    """A pass that rounds although it says that it does not."""
    from dataclasses import dataclass

    from cipm_ir import passes
    from cipm_ir.symmetry.program import Program

    @dataclass(frozen=True)
    class Rounds(passes.Pass):
        """Scale by a number that is no power of two."""

        claims: bool = True

        def run(self, program: Program, ctx: passes.Context) -> passes.PassResult:
            """Scale every space by 3."""
            elements = {}
            for space in program.spaces:
                one = space.identity()
                elements[space] = type(one)(one.perm, one.scale * 3.0, one.sign)
            return passes.PassResult(program.act(elements), bit_exact=self.claims)

    nodes: list[Any] = [("MatMul", ["x", "w"], "h"), ("Relu", ["h"], "r"), ("MatMul", ["r", "v"], "y")]
    original = model(nodes, {"w": W, "v": V})
    for claims in (True, False):
        (step,) = cipm_ir.optimize(original, [Rounds(claims)]).report.steps
        assert step.skipped is claims, step.checked
