"""Differential verification: equal models pass, every kind of difference is reported, what cannot be run is said so."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.paths import ROOT

from cipm_ir.errors import InputError, UnsupportedError
from cipm_ir.frontends.onnx.load import load_onnx
from cipm_ir.runtime import session
from cipm_ir.runtime.inputs.generate import batches, random_inputs
from cipm_ir.runtime.inputs.index_inputs import table_size
from cipm_ir.runtime.session import Runner, run
from cipm_ir.runtime.verification.cases import RECIPES
from cipm_ir.runtime.verification.compare import Found, compare
from cipm_ir.runtime.verification.noise import Yardstick
from cipm_ir.runtime.verification.verify import verify_models

FLOAT = TensorProto.FLOAT
RNG = np.random.default_rng(0)
W1 = RNG.standard_normal((6, 50)).astype(np.float32)
W2 = RNG.standard_normal((50, 3)).astype(np.float32)


def build(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, Sequence[Any]]],
    outputs: Mapping[str, tuple[int, Sequence[Any] | None]],
    weights: dict[str, np.ndarray[Any, Any]] | None = None,
    *,
    domains: Sequence[str] = (),
) -> ir.Model:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", 20), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return load_onnx(helper.make_model(graph, opset_imports=imports, ir_version=10)).model


def network(w1: np.ndarray[Any, Any] = W1, w2: np.ndarray[Any, Any] = W2, kind: int = FLOAT) -> ir.Model:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["y"]),
    ]
    return build(nodes, {"x": (kind, ["N", 6])}, {"y": (kind, ["N", 3])}, {"w1": w1, "w2": w2})


# --- the comparison -------------------------------------------------------------------------------


def test_a_permuted_network_is_equal_and_a_scaled_one_bit_for_bit() -> None:
    order = RNG.permutation(50)
    permuted = verify_models(network(), network(W1[:, order], W2[order]))
    assert permuted.ok and permuted and permuted.verified and permuted.cases > len(RECIPES) and permuted.max_rel < 1e-5
    scale = (2.0 ** RNG.integers(-3, 4, 50)).astype(np.float32)
    scaled = verify_models(network(), network(W1 * scale, W2 / scale[:, None]))
    assert scaled.ok and scaled.max_abs == 0.0


def test_one_changed_weight_is_caught() -> None:
    changed = W1.copy()
    changed[2, 7] += 1e-2
    result = verify_models(network(), network(changed))
    assert result.ok is False and not result and result.verified
    assert "'y'" in result.reason and 1e-5 < result.max_rel < 1e-1 and result.outputs["y"][1] == result.max_rel
    assert verify_models(network(), network(changed), rtol=0.5).ok


def test_shapes_names_and_nan_are_caught() -> None:
    wider = verify_models(network(), network(W1, RNG.standard_normal((50, 4)).astype(np.float32)))
    assert wider.ok is False and "shape" in wider.reason and wider.max_abs == np.inf
    nan = W2.copy()
    nan[0, 0] = np.nan
    result = verify_models(network(), network(W1, nan))
    assert result.ok is False and "NaN" in result.reason
    renamed = network()
    renamed.graph.outputs[0].name = "z"
    assert verify_models(network(), renamed).ok is False
    # A network that only gives NaN shows nothing about another one.
    assert verify_models(network(W1, np.full_like(W2, np.nan)), network(W1, np.full_like(W2, np.nan))).ok is None


def test_a_second_model_that_does_not_run_is_different() -> None:
    result = verify_models(network(), network(W1[:, :40], W2))
    assert result.ok is False and "second model fails" in result.reason


@pytest.mark.parametrize(
    ("dtype", "kind", "equal", "different"),
    [
        (np.float64, TensorProto.DOUBLE, 1e-16, 1e-12),
        (np.float16, TensorProto.FLOAT16, 5e-4, 3e-2),
        (ml_dtypes.bfloat16, TensorProto.BFLOAT16, 4e-3, 0.2),
    ],
)
def test_other_types(dtype: Any, kind: int, equal: float, different: float) -> None:
    a, b = (w.astype(dtype) for w in (W1, W2))
    for change, ok in ((equal, True), (different, False)):
        result = verify_models(
            network(a, b, kind), network(a, (W2.astype(np.float64) * (1 + change)).astype(dtype), kind)
        )
        assert result.ok is ok, (change, result)
    assert result.backend == ("reference" if kind == TensorProto.BFLOAT16 else "onnxruntime")


def test_integer_outputs_must_be_equal() -> None:
    def classify(weight: np.ndarray[Any, Any]) -> ir.Model:
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["s"]),
            helper.make_node("ArgMax", ["s"], ["y"], axis=1, keepdims=0),
        ]
        return build(nodes, {"x": (FLOAT, ["N", 6])}, {"y": (TensorProto.INT64, ["N"])}, {"w": weight})

    assert verify_models(classify(W1), classify(W1)).ok
    result = verify_models(classify(W1), classify(W1[:, ::-1].copy()))
    assert result.ok is False and "'y < ArgMax'" in result.reason and result.outputs["y"][0] > 0
    # Three classes, one of which never wins: its scores are compared all the same.
    low = np.concatenate([W1, W1[:, :1] - 100], axis=1)[:, -3:]
    assert verify_models(classify(low), classify(low * np.array([1, 1, 1.001], np.float32))).ok is False


def test_compare_treats_equal_infinities_as_equal() -> None:
    a = np.array([1.0, np.inf, -np.inf, np.nan], np.float32)
    assert compare(Yardstick(a), a.copy()) == Found(0.0, 0.0, 0.0, "")
    assert compare(Yardstick(a), np.array([1.0, -np.inf, np.inf, np.nan], np.float32)).why
    zeros = Yardstick(np.zeros(3, np.float32))
    assert compare(zeros, np.array([0, 0, 1e-3], np.float32)).max_rel == np.inf
    assert compare(zeros, np.zeros(3, np.float64)).why == "type float32 became float64"


def test_random_operators_and_unknown_operators_are_not_verified() -> None:
    draw = [
        helper.make_node("RandomNormalLike", ["x"], ["r"], name="noise"),
        helper.make_node("Add", ["x", "r"], ["y"]),
    ]
    shapes = {"x": (FLOAT, ["N", 6])}, {"y": (FLOAT, ["N", 6])}
    noisy = build(draw, *shapes)
    result = verify_models(noisy, noisy)
    assert result.ok is None and not result.verified and "'noise'" in str(result)
    draw[0].attribute.append(helper.make_attribute("seed", 3.0))
    assert verify_models(build(draw, *shapes), build(draw, *shapes)).ok
    drop = [helper.make_node("Dropout", ["x", "", "train"], ["y"], name="drop")]
    for train, ok in ((True, None), (False, True)):
        model = build(drop, *shapes, weights={"train": np.array(train)})
        assert verify_models(model, model).ok is ok
    custom = build([helper.make_node("FancyOp", ["x"], ["y"], domain="com.example")], *shapes, domains=["com.example"])
    result = verify_models(custom, custom)
    assert result.ok is None and "FancyOp" in result.reason


def test_exported_graphs_equal_themselves_and_not_a_damaged_copy(data_dir: Path) -> None:
    for path in sorted((data_dir / "graphs").glob("*.onnx")):
        a, b = load_onnx(path).model, load_onnx(path).model
        assert verify_models(a, b, cases=1).ok, path.name
        value = max(b.graph.initializers.values(), key=lambda value: value.const_value.nbytes)  # type: ignore[union-attr]
        array = value.const_value.numpy().copy()  # type: ignore[union-attr]
        value.const_value = ir.tensor(array * np.float32(1.5), name=value.name)
        assert verify_models(a, b, cases=1).ok is False, path.name


# --- data -----------------------------------------------------------------------------------------


def test_given_data_is_used_and_cut(tmp_path: Path) -> None:
    x = RNG.standard_normal((20, 6)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, labels=np.arange(20))
    for data in (tmp_path / "d.npz", str(tmp_path / "d.npz"), {"x": x}, [{"x": x[:8]}, {"x": x[8:16]}, {"x": x[16:]}]):
        assert [len(feeds["x"]) for feeds in batches(data, network())] == [8, 8, 4]
        assert verify_models(network(), network(), data=data, cases=3).cases == 6


def test_given_data_shows_a_difference_that_random_inputs_do_not() -> None:
    def beyond(factor: float) -> ir.Model:
        names = [("Sub", ["x", "limit"], "d"), ("Relu", ["d"], "r"), ("Mul", ["r", "k"], "y")]
        nodes = [helper.make_node(op, inputs, [output]) for op, inputs, output in names]
        weights = {"limit": np.float32(500), "k": np.float32(factor)}
        return build(
            nodes, {"x": (FLOAT, ["N", 6])}, {"y": (FLOAT, ["N", 6])}, {n: np.asarray(w) for n, w in weights.items()}
        )

    assert verify_models(beyond(1), beyond(2)).ok
    assert verify_models(beyond(1), beyond(2), data={"x": np.full((1, 6), 600, np.float32)}).ok is False


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ("nothing.npz", "no data file"),
        ({"z": np.zeros((4, 6), np.float32), "u": np.zeros(4)}, "'x'"),
        ({"x": np.zeros((4, 7), np.float32)}, "shape"),
        ({"x": np.zeros((4, 6), np.complex64)}, "complex64"),
        ([3], "shape"),
        (3, "of type int"),
    ],
)
def test_bad_data(data: Any, word: str) -> None:
    with pytest.raises(InputError, match=word):
        verify_models(network(), network(), data=data)


def test_fixed_batches_are_kept() -> None:
    model = build([helper.make_node("Relu", ["x"], ["y"])], {"x": (FLOAT, [3, 6])}, {"y": (FLOAT, [3, 6])})
    x = np.zeros((10, 6), np.float32)
    assert [len(feeds["x"]) for feeds in batches({"x": x}, model)] == [3, 3, 3]
    with pytest.raises(InputError, match="exactly 3"):
        list(batches({"x": x[:2]}, model))


# --- random inputs --------------------------------------------------------------------------------


def transformer_inputs() -> ir.Model:
    nodes = [
        helper.make_node("Cast", ["ids"], ["i"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "i"], ["e"]),
        helper.make_node("Gather", ["types", "type_ids"], ["t"]),
        helper.make_node("Cast", ["keep"], ["m"], to=FLOAT),
        helper.make_node("ReduceSum", ["m"], ["ms"], keepdims=0),
        helper.make_node("Add", ["e", "t"], ["et"]),
        helper.make_node("Mul", ["et", "ms"], ["y"]),
    ]
    axes = ["batch", "seq"]
    inputs: dict[str, Any] = {
        "ids": (TensorProto.INT32, axes),
        "type_ids": (TensorProto.INT64, axes),
        "keep": (TensorProto.INT64, axes),
    }
    weights = {"table": np.ones((11, 4), np.float32), "types": np.ones((3, 4), np.float32)}
    return build(nodes, inputs, {"y": (FLOAT, [*axes, 4])}, weights)


def test_random_indices_stay_inside_their_tables_and_masks_start_with_one() -> None:
    model = transformer_inputs()
    assert [table_size(value) for value in model.graph.inputs] == [11, 3, None]
    feeds = random_inputs(model, np.random.default_rng(0), batch=40, dims={"seq": 9})
    assert {feeds[name].shape for name in feeds} == {(40, 9)}
    assert feeds["ids"].dtype == np.int32 and feeds["ids"].max() == 10 and feeds["type_ids"].max() == 2
    keep = feeds["keep"]
    assert set(np.unique(keep)) == {0, 1} and (keep[:, 0] == 1).all() and (np.diff(keep, axis=1) <= 0).all()
    assert keep.mean() > 0.5
    assert verify_models(model, model).ok


def test_a_literal_batch_inside_is_found_by_trying() -> None:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    model = build(nodes, {"x": (FLOAT, ["N", 6])}, {"y": (FLOAT, [6])}, {"shape": np.array([6])})
    assert verify_models(model, model).ok


def test_axes_named_by_an_expression_follow_their_symbols() -> None:
    nodes = [
        helper.make_node("Concat", ["past", "new"], ["all"], axis=1),
        helper.make_node("Add", ["all", "bias"], ["y"]),
    ]
    inputs: dict[str, Any] = {
        "bias": (FLOAT, ["batch", "past_len + 1"]),
        "past": (FLOAT, ["batch", "past_len"]),
        "new": (FLOAT, ["batch", 1]),
    }
    model = build(nodes, inputs, {"y": (FLOAT, None)})
    feeds = random_inputs(model, np.random.default_rng(0))
    assert [feeds[name].shape for name in inputs] == [(2, 9), (2, 8), (2, 1)]
    assert verify_models(model, model).ok


def test_inputs_that_cannot_be_drawn_are_not_verified() -> None:
    model = build([helper.make_node("Relu", ["x"], ["y"])], {"x": (FLOAT, ["N"])}, {"y": (FLOAT, None)})
    model.graph.inputs[0].shape = None
    assert "no known rank" in verify_models(model, model).reason
    assert verify_models(model, model, data={"x": np.zeros(4, np.float32)}).ok


# --- sessions -------------------------------------------------------------------------------------


def test_inner_values_can_be_read() -> None:
    model = network()
    x = RNG.standard_normal((4, 6)).astype(np.float32)
    got = run(model, {"x": x}, ["r", "y"])
    np.testing.assert_allclose(got["r"], np.maximum(x @ W1, 0), rtol=1e-5, atol=1e-6)
    assert list(got) == ["r", "y"] and [value.name for value in model.graph.outputs] == ["y"]
    with pytest.raises(InputError, match="'none'"):
        run(model, {"x": x}, ["none"])


def test_large_models_go_through_a_temporary_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_IN_MEMORY", 100)
    model = network()
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    with Runner(model) as runner:
        folder = runner._folder
        assert folder is not None and Path(folder.name, "model.data").exists()
        assert runner.run({"x": np.zeros((1, 6), np.float32)})["y"].tolist() == [[0, 0, 0]]
    assert not Path(folder.name).exists()
    assert {name: value.const_value for name, value in model.graph.initializers.items()} == before


def _anonymous() -> int:
    """Bytes of this process that are no pages of mapped files."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


_MAPPED = """
import json
import numpy as np
import onnx.parser, onnx_ir as ir
from tests.runtime.test_verify import _anonymous
from cipm_ir.runtime import session
session._IN_MEMORY = 1 << 20
weight = np.random.default_rng(0).standard_normal((3000, 3000)).astype(np.float32)
one = ir.from_proto(onnx.parser.parse_model(
    '<ir_version: 10, opset_import: ["": 20]> g (float[N, 3000] x, float[3000, 3000] w) => (float[N, 3000] y)'
    ' { y = MatMul(x, w) }'))
value = one.graph.inputs.pop()
value.const_value = ir.tensor(weight, name="w")
one.graph.initializers["w"] = value
x = np.random.default_rng(1).standard_normal((2, 3000)).astype(np.float32)
before = _anonymous()
with session.Runner(one, lean=LEAN, threads=1) as runner:
    made = runner.run({"x": x})["y"]
    print(json.dumps([_anonymous() - before, bool(np.allclose(made, x @ weight, rtol=1e-3, atol=1e-2))]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("lean", [True, None, False])
def test_weights_of_large_models_are_mapped(lean: bool | None) -> None:
    """Not copied for speed; negative control: with such copies as many bytes as the weights are taken."""
    code = _MAPPED.replace("LEAN", repr(lean))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    taken, right = json.loads(done.stdout)
    assert right and (taken < 18e6 if lean is not False else taken > 18e6)


def test_backends_can_be_named_and_failures_are_told_apart() -> None:
    model = network()
    x = RNG.standard_normal((4, 6)).astype(np.float32)
    with Runner(model, backend="reference") as slow, Runner(model, backend="onnxruntime") as fast:
        np.testing.assert_allclose(slow.run({"x": x})["y"], fast.run({"x": x})["y"], rtol=1e-5, atol=1e-5)
        with pytest.raises(InputError, match="failed to run"):
            fast.run({"x": x[:, :5]})
    half = network(W1.astype(ml_dtypes.bfloat16), W2.astype(ml_dtypes.bfloat16), TensorProto.BFLOAT16)
    with pytest.raises(UnsupportedError, match="BFLOAT16"):
        Runner(half, backend="onnxruntime")


def test_the_reason_tells_of_infinities_first() -> None:
    """Where nothing is allowed every difference is infinitely too large; one input overflows."""
    graph = "g (float[N, 2] x) => (float[N, 2] y) <float[2] w = {1, 1}> { y = Mul(x, w) }"
    first = ir.from_onnx_text(f'<ir_version: 9, opset_import: ["" : 17]> {graph}')
    second = ir.from_onnx_text(f'<ir_version: 9, opset_import: ["" : 17]> {graph.replace("{1, 1}", "{2, 3}")}')
    data = [np.full((2, 2), size, np.float32) for size in (1.0, 2e38)]
    found = verify_models(first, second, data=[{"x": x} for x in data], rtol=0.0, atol=0.0)
    assert found.ok is False and "NaN or infinities" in found.reason, str(found)
